"""The folder of one training run: its config, its events, its checkpoints, its adapter. Imports no torch.

::

    config.json     the options, with the digests of base and data
    metrics.jsonl   one event on each line, flushed at once
    loss.png        a plot of it
    checkpoints/    checkpoint-N, created atomically, each a complete PEFT folder
    adapter/        the finished adapter, not yet published
    result.json     the result; written last
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from adapters.errors import RunFolderInvalid
from adapters.fsync import sync_folder

EventKind = Literal[
    "start", "step", "eval", "checkpoint", "pruned", "end", "note", "warning", "evaluating", "evaluated"
]
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """A run folder, locked by one process at a time.

    Args:
        path: created if it does not exist.
        resume: whether it may already contain a run.
        writes: False for all but one of several processes of one training run.

    Raises:
        RunFolderInvalid: another process uses it, or it contains a run and ``resume`` is False.
    """

    def __init__(self, path: Path, resume: bool = False, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        if writes and (path / "config.json").exists() and not resume:
            raise RunFolderInvalid(
                f"{path} already contains a run; continue it with --resume, or choose another --run-dir."
            )
        self._events: TextIO | None = None
        if writes:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
            self._events = (path / "metrics.jsonl").open("a", encoding="utf-8")
            shutil.rmtree(self._unfinished, ignore_errors=True)  # left by a killed process

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _unfinished(self) -> Path:
        return self.checkpoints / ".partial"

    def _take(self) -> TextIO:
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderInvalid(f"Another process uses {self.path}; wait until it ends.") from None
        return lock

    def close(self) -> None:
        """Release the lock."""
        if self._events is not None:
            self._events.close()
            self._lock.close()

    def event(self, kind: EventKind, **fields: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self._events is not None:
            line = json.dumps({"event": kind, "time": round(time.time(), 3), **fields}, default=str)
            self._events.write(line + "\n")
            self._events.flush()

    def events(self) -> list[dict[str, Any]]:
        """All events so far. A line that a killed process left incomplete is skipped."""
        found = []
        for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def curve(self, kind: EventKind) -> dict[int, float]:
        """Loss by step, from ``step`` or ``eval`` events. Steps that a resumed run repeated count once."""
        return {event["step"]: event["loss"] for event in self.events() if event["event"] == kind}

    def check_same_run(self, config: dict[str, Any], may_differ: Collection[str]) -> None:
        """Store the config of a new run. For a resumed run, check that it is the same.

        An option that did not exist when the run was started counts as off.

        Raises RunFolderInvalid, which names the difference.
        """
        known = self.read("config.json")
        if known is None:
            self.write("config.json", config)
            return
        keys = (config.keys() | known.keys()) - set(may_differ)
        differ = sorted(key for key in keys if _differs(config.get(key), known, key))
        if differ:
            raise RunFolderInvalid(
                f"{self.path} contains a run with another {', '.join(differ)}; "
                "resume it with the options it was started with, or choose another --run-dir."
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if it does not exist."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderInvalid(f"{self.path / name} cannot be read ({error}).") from error
        return value

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        if not self.writes:
            return
        partial = self.path / f".{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, default=str)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / name)

    def finished_checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def last_checkpoint(self) -> Path | None:
        return (self.finished_checkpoints() or [None])[-1]  # type: ignore[list-item]

    @contextmanager
    def new_checkpoint(self, name: str, keep: int) -> Iterator[Path]:
        """A folder to write the checkpoint ``name`` into. It appears among the checkpoints atomically at the
        end.

        Args:
            keep: how many checkpoints are kept, including this one.
        """
        self._unfinished.mkdir(parents=True, exist_ok=True)
        try:
            yield self._unfinished
            if self.writes:
                target = self.checkpoints / name
                shutil.rmtree(target, ignore_errors=True)
                sync_folder(self._unfinished / name)
                os.replace(self._unfinished / name, target)
                for old in self.finished_checkpoints()[:-keep]:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            if self.writes:
                shutil.rmtree(self._unfinished, ignore_errors=True)


def _differs(value: Any, known: dict[str, Any], key: str) -> bool:
    return bool(value != known.get(key, False if value is False else None))
