"""Every error that the adapters floor raises, as one tree.

::

    ManyloraError
    ├── BaseModelError              the 4-bit base cannot be had or used
    │   ├── BaseNotFound            nothing at that path, or the hub has no such id
    │   └── BaseCorrupt             a digest differs, or a file is not what it claims
    ├── AdapterError                one adapter; the server and the others go on
    │   ├── AdapterNotFound         no adapter has that name
    │   ├── AdapterNotReady         its folder is still being written, or was not read yet
    │   ├── AdapterNameInvalid      the name or its path is not allowed
    │   ├── AdapterExists           the name is taken, and replacing was not asked for
    │   ├── AdapterInvalid          the folder is broken (shapes, NaN, missing tensors, …)
    │   ├── AdapterUnsupported      a kind of adapter that cannot be served exactly yet
    │   ├── AdapterTooLarge         rank or bytes over a cap
    │   ├── AdapterChanged          the content on disk is not the registered version's
    │   └── AdapterOutOfMemory      memory ran out while it was loaded
    └── TrainingError               one training; its checkpoints stay
        ├── RecipeInvalid           an option, or two that do not go together
        ├── DatasetInvalid          rows that cannot be learnt from, line by line
        │   └── DatasetUnreadable   a whole file: it is missing, or of another kind
        ├── RunFolderInvalid        a run folder that is taken, or not what is to be resumed
        ├── TrainingDiverged        the loss is no number any more
        └── TrainingOutOfResources  memory or disk ran out

Messages are whole sentences for users: they name the field or tensor and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ManyloraError(Exception):
    """Anything that manylora says about itself; never a bug's traceback."""


class BaseModelError(ManyloraError):
    """The base model cannot be had or used."""


class BaseNotFound(BaseModelError):
    """Nothing usable at the path, or no such id on the hub."""


class BaseCorrupt(BaseModelError):
    """A digest differs, or a file is not what it claims to be."""


class AdapterError(ManyloraError):
    """One adapter cannot be served; the server and all other adapters go on."""


class AdapterNotFound(AdapterError):
    """No adapter has that name."""


class AdapterNotReady(AdapterError):
    """Its folder is still being written, or was not read yet; soon it may be served."""


class AdapterNameInvalid(AdapterError):
    """The name is not one that ``adapters.paths`` allows, or its path leaves the adapter folder."""


class AdapterExists(AdapterError):
    """The name is taken, and replacing it was not asked for."""


class AdapterInvalid(AdapterError):
    """The folder is broken: shapes, NaN, missing or unknown tensors, unreadable files."""


class AdapterUnsupported(AdapterError):
    """A kind of adapter that cannot be served exactly yet."""


class AdapterTooLarge(AdapterError):
    """Rank or bytes over a cap (known from the header, before memory is taken)."""


class AdapterChanged(AdapterError):
    """The content on disk is no longer that of the registered version."""


class AdapterOutOfMemory(AdapterError):
    """Memory ran out, on the device or the host, while it was loaded; later it may not."""


class TrainingError(ManyloraError):
    """One training cannot begin or go on; what it has saved so far stays."""


class RecipeInvalid(TrainingError):
    """An option's value, or two options that do not go together."""


@dataclass(frozen=True, slots=True)
class LineProblem:
    """Why one row cannot be used. ``line`` counts from 1; ``reason`` completes "line 7 …"."""

    line: int
    reason: str


class DatasetInvalid(TrainingError):
    """Rows that cannot be learnt from.

    Attributes:
        problems: in the order of the file, at most ``MAX_KEPT``.
        count: how many there are in all.
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
    """A file that holds no rows: it is missing, or of another kind. ``reason`` completes "train.csv …"."""

    def __init__(self, file: str, reason: str) -> None:
        self.problems, self.count, self.reason = (), 0, reason
        self.summary = f"{file} {reason}"
        TrainingError.__init__(self, self.summary)


class RunFolderInvalid(TrainingError):
    """A run folder that is taken already, or is not the run that is to be resumed."""


class TrainingDiverged(TrainingError):
    """The loss is no number any more."""


class TrainingOutOfResources(TrainingError):
    """Memory or disk ran out."""
