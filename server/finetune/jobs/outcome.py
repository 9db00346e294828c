"""Finds out how a training process ended, from its exit code and the files in its run folder."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.finetune.jobs import progress
from server.finetune.jobs.database import Status

OutcomeKind = Literal["published", "failed", "left", "died"]
LOG = "train.log"
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one attempt at a job.

    Attributes:
        kind: ``published``: the adapter is in the adapter folder; ``left``: the process stopped on request,
            and the job can be resumed; ``died``: a signal killed the process; ``failed``: the job would fail
            again.
        code: the code of OpenAI's ``error`` of a job.
        message: a whole sentence.
        trained_tokens: None if the process did not report it.
        evaluation: the figures of adapter and base on the validation file; None without such a file.
    """

    kind: OutcomeKind
    code: str | None = None
    message: str = ""
    trained_tokens: int | None = None
    evaluation: dict[str, Any] | None = None

    def error(self) -> dict[str, Any]:
        """OpenAI's ``error`` of a job."""
        return {"code": self.code or "training_failed", "message": self.message, "param": None}

    def event_message(self, status: Status) -> str:
        """The message of the job event, given the job's new ``status``."""
        if status == "succeeded":
            return "The job has successfully completed"
        if status == "failed":
            return f"Fine-tuning job failed: {self.message}"
        what = "is paused" if status == "paused" else "is queued again"
        return f"{self.message} The job {what} and will resume from its last checkpoint".lstrip()


def outcome_of(folder: Path, code: int | None) -> Outcome:
    """The outcome of the process that trained in the run folder ``folder``.

    Args:
        code: the exit code (negative: a signal); None if the process was told to stop, or ended with its
            server.
    """
    result = progress.read_result(folder)
    if result is not None and result.status in _RESULTS:
        return _RESULTS[result.status](result)
    if code is None or code == _INTERRUPTED:
        return Outcome("left")
    if code < 0:
        return Outcome("died", "process_died", f"The training process was killed by {_signal(-code)}.")
    message = _last_words(folder) or f"The training process ended with exit code {code}."
    return Outcome("failed", "training_failed", message)


def _published(result: progress.Result) -> Outcome:
    tokens = result.metrics.get("trained_tokens")
    count = int(tokens) if isinstance(tokens, int | float) else None
    return Outcome("published", trained_tokens=count, evaluation=result.evaluation)


def _kept(result: progress.Result) -> Outcome:
    reason = result.reason or "The adapter was not published."
    return Outcome("failed", "not_improved", reason, evaluation=result.evaluation)


def _failed(result: progress.Result) -> Outcome:
    return Outcome("failed", _code(result.error_type), result.reason or "Training failed.")


_RESULTS = {"published": _published, "kept": _kept, "failed": _failed}


def _code(error_type: str | None) -> str:
    """``OutOfMemory`` as ``out_of_memory``."""
    name = error_type or "TrainingFailed"
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_words(folder: Path) -> str:
    """The last line in the log, without the command's name at its start."""
    try:
        lines = (folder / LOG).read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("manylora train: ")[:1000] if lines else ""
