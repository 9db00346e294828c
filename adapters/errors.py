"""Every error that ``adapters`` raises, as one tree.

::

    ManyloraError
    ├── BaseModelError              the 4-bit base is not available or cannot be used
    │   ├── BaseNotFound            nothing at that path, or the hub has no such id
    │   ├── BaseCorrupt             a digest differs, or a file is not what it claims
    │   └── BaseTooLarge            memory or disk space is missing
    ├── AdapterError                one adapter failed; the server and the others continue
    │   ├── AdapterNotFound         no adapter has that name
    │   ├── AdapterNotReady         its folder is still being written, or was not read yet
    │   ├── AdapterNameInvalid      the name or its path is not allowed
    │   ├── AdapterExists           the name is taken, and replacing was not asked for
    │   ├── AdapterInvalid          the folder is broken (shapes, NaN, missing tensors, …)
    │   ├── AdapterUnsupported      a kind of adapter that cannot be served exactly yet
    │   ├── AdapterTooLarge         rank or bytes over a cap
    │   ├── AdapterChanged          the content on disk is not the registered version's
    │   └── AdapterOutOfMemory      memory ran out while it was loaded
    └── TrainingError               one training run failed; its checkpoints stay
        ├── RecipeInvalid           an invalid option, or two options that conflict
        ├── DatasetInvalid          rows that cannot be used, line by line
        │   └── DatasetUnreadable   a whole file: it is missing, or of another type
        ├── RunFolderInvalid        a run folder that is in use, or not the run to resume
        ├── TrainingDiverged        the loss is NaN or infinite
        └── TrainingOutOfResources  memory or disk ran out

Messages are whole sentences for users: they name the field or tensor and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ManyloraError(Exception):
    """Base class of all expected errors. A bug raises something else."""


class BaseModelError(ManyloraError):
    """The base model is not available or cannot be used."""


class BaseNotFound(BaseModelError):
    """There is nothing usable at the path, or the hub has no such id."""


class BaseCorrupt(BaseModelError):
    """A digest differs, or a file is not what it claims to be."""


class BaseTooLarge(BaseModelError):
    """Memory or disk space is missing. The text says how much."""


class AdapterError(ManyloraError):
    """One adapter cannot be served. The server and all other adapters continue."""


class AdapterNotFound(AdapterError):
    """No adapter has that name."""


class AdapterNotReady(AdapterError):
    """Its folder is still being written or was not read yet. It may be served soon."""


class AdapterNameInvalid(AdapterError):
    """The name is not one that ``adapters.paths`` allows, or its path leaves the adapter folder."""


class AdapterExists(AdapterError):
    """The name is taken, and replacing it was not asked for."""


class AdapterInvalid(AdapterError):
    """The folder is broken: shapes, NaN, missing or unknown tensors, unreadable files."""


class AdapterUnsupported(AdapterError):
    """A kind of adapter that cannot be served exactly yet."""


class AdapterTooLarge(AdapterError):
    """The rank or the size exceeds a cap. This is known from the header, before memory is allocated."""


class AdapterChanged(AdapterError):
    """The content on disk differs from the registered version."""


class AdapterOutOfMemory(AdapterError):
    """Memory ran out, on the device or the host, while the adapter was loaded. A later try may succeed."""


class TrainingError(ManyloraError):
    """A training run cannot start or continue. What it has saved stays."""


class RecipeInvalid(TrainingError):
    """An option's value is invalid, or two options conflict."""


@dataclass(frozen=True, slots=True)
class LineProblem:
    """The reason why one row cannot be used. ``line`` counts from 1. ``reason`` completes "line 7 …"."""

    line: int
    reason: str


class DatasetInvalid(TrainingError):
    """There are rows that cannot be used.

    Attributes:
        problems: in the order of the file, at most ``MAX_KEPT``.
        count: how many problems there are in total.
        summary: the message without the rows.
    """

    MAX_KEPT = 500
    _SHOWN = 10

    def __init__(self, file: str, problems: Sequence[LineProblem], count: int | None = None) -> None:
        self.problems = tuple(problems[: self.MAX_KEPT])
        self.count = len(problems) if count is None else count
        shown = [f"line {problem.line} {problem.reason}" for problem in self.problems[: self._SHOWN]]
        more = [f"and {self.count - len(shown)} more"] if self.count > len(shown) else []
        rows = "1 row" if self.count == 1 else f"{self.count} rows"
        self.summary = f"{file} has {rows} that cannot be used."
        super().__init__(f"{self.summary[:-1]}: {'; '.join([*shown, *more])}.")


class DatasetUnreadable(DatasetInvalid):
    """The file has no rows: it is missing or of another type. ``reason`` completes "train.csv …"."""

    def __init__(self, file: str, reason: str) -> None:
        self.problems, self.count, self.reason = (), 0, reason
        self.summary = f"{file} {reason}"
        TrainingError.__init__(self, self.summary)


class RunFolderInvalid(TrainingError):
    """The run folder is already in use, or it is not the run to resume."""


class TrainingDiverged(TrainingError):
    """The loss is NaN or infinite."""


class TrainingOutOfResources(TrainingError):
    """Memory or disk ran out."""
