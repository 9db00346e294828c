"""Reads a run folder: ``metrics.jsonl`` while it grows, and ``result.json`` at the end. Writes nothing."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.finetune.jobs.database import JobEvent

logger = logging.getLogger("manylora.jobs")

METRICS, RESULT = "metrics.jsonl", "result.json"
_MOST = 1 << 20
"""Most bytes that are read at once, which bounds the size of a transaction."""
_TRAIN = {"loss": "train_loss", "accuracy": "train_mean_token_accuracy"}
_VALID = {"loss": "full_valid_loss", "accuracy": "full_valid_mean_token_accuracy"}
_BOTH = _TRAIN | {f"eval_{name}": renamed for name, renamed in _VALID.items()}
_RENAMED = {"step": _TRAIN, "eval": _VALID, "checkpoint": _BOTH}
"""For each kind of event: OpenAI's names by the names in ``metrics.jsonl``."""


@dataclass(frozen=True, slots=True)
class MetricsLine:
    """One line of ``metrics.jsonl``: a JSON object in which all numbers are finite."""

    values: dict[str, Any]

    @property
    def event(self) -> str:
        return str(self.values.get("event", "note"))

    @property
    def time(self) -> float:
        written = self.values.get("time")
        return float(written) if isinstance(written, int | float) else time.time()

    def as_event(self, job_id: str) -> JobEvent:
        """The line as an event for clients."""
        renamed = _RENAMED.get(self.event, {})
        numbers = {
            renamed.get(name, name): value
            for name, value in self.values.items()
            if isinstance(value, int | float) and name != "time"
        }
        kind = {"step": "metrics", "eval": "metrics", "checkpoint": "checkpoint"}.get(self.event, "message")
        return JobEvent(
            job_id=job_id,
            created_at=self.time,
            level="warn" if self.event == "warning" else "info",
            kind=kind,
            message=self._message(numbers),
            data=numbers,
        )

    def estimated_finish(self) -> float | None:
        """Unix time, if the line has an estimate."""
        seconds = self.values.get("eta_seconds")
        return self.time + seconds if isinstance(seconds, int | float) else None

    def _message(self, numbers: dict[str, Any]) -> str:
        at = f"Step {numbers.get('step')}/{numbers.get('total_steps', '?')}"
        if self.event == "step":
            return f"{at}: training loss={_short(numbers.get('train_loss'))}"
        if self.event == "eval":
            return f"{at}: validation loss={_short(numbers.get('full_valid_loss'))}"
        if self.event == "checkpoint":
            return f"Checkpoint created at step {numbers.get('step')}"
        if self.event == "end":  # clients must not see the line's message, which has a path of the server
            return "The adapter is trained"
        return str(self.values.get("message") or f"Training: {self.event}")


@dataclass(frozen=True, slots=True)
class Result:
    """``result.json``, the last file that the training command writes."""

    status: str
    reason: str | None
    error_type: str | None
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None = None


def read_lines(folder: Path, offset: int) -> tuple[list[MetricsLine], int]:
    """The complete lines from byte ``offset``, and the offset of the next line.

    A file that is shorter than ``offset`` was started anew and is read from its start.
    """
    try:
        with (folder / METRICS).open("rb") as file:
            if file.seek(0, 2) < offset:
                offset = 0
            file.seek(offset)
            data = file.read(_MOST)
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    lines = [line for line in map(_parse, complete.splitlines()) if line is not None]
    return lines, offset + len(complete)


def read_result(folder: Path) -> Result | None:
    """The result; None if there is none yet, or if it cannot be parsed."""
    try:
        values = json.loads((folder / RESULT).read_text("utf-8"))
        metrics = dict(values.get("metrics") or {})
        evaluation = dict(values["evaluation"]) if values.get("evaluation") else None
        reason, error_type = values.get("reason"), values.get("error_type")
        return Result(str(values["status"]), reason, error_type, metrics, evaluation)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("result.json is unreadable", extra={"fields": {"folder": folder.name}})
        return None


def as_csv(events: Iterable[JobEvent]) -> str:
    """The numbers of the events as CSV, one row for each event."""
    text = io.StringIO()
    columns = ["step", "epoch", *_TRAIN.values(), *_VALID.values(), "learning_rate"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(event.data for event in events)
    return text.getvalue()


def _parse(line: bytes) -> MetricsLine | None:
    """The line; None if it cannot be parsed, for example because a kill cut it."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return (
        MetricsLine({name: _finite(value) for name, value in values.items()})
        if isinstance(values, dict)
        else None
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(loss: Any) -> str:
    return f"{loss:.4f}" if isinstance(loss, int | float) else "none"
