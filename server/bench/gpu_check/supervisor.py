"""Runs the sections in a child process and collects their results. No torch.

One process runs all sections, one after the other. If it dies, hangs, or stops after a GPU fault, the section
that was running has failed. A new process then starts with the next section.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from server.bench.gpu_check.rows import Result, Row
from server.bench.gpu_check.sections import Section

_GRACE_S = 15.0
"""How long a section may exceed its time. It checks the time only between its rows."""

_START_S = 120.0
"""The time to import torch and to find the GPU."""


def run(
    sections: Sequence[Section],
    budget: float,
    done: Callable[[Result], None],
    log: Path | None = None,
    command: Sequence[str] = (),
) -> list[Result]:
    """Run ``sections`` within ``budget`` seconds.

    Args:
        done: called with each result when its section ends.
        log: the file to which the output of the processes is appended (default: none).
        command: the command that starts a process (default: ``child.py``).
    """
    ends = _ends(sections, time.monotonic(), budget)
    waiting = {section.name: section for section in sections}
    results: list[Result] = []
    while waiting:
        began = time.monotonic()
        sink = _sink(log)
        child = _Child(command or (sys.executable, "-m", f"{__package__}.child"), sink)
        try:
            child.send({"ends": {name: ends[name] for name in waiting}})
            ended = _collect(child, waiting, ends)
        finally:
            child.stop()
        if not ended:  # it ran no section
            ended = [_never_ran(waiting, child, time.monotonic() - began)]
        for result in ended:
            waiting.pop(result.name)
            results.append(result)
            done(result)
    return results


def _sink(log: Path | None) -> IO[str]:
    """The file for a process's output. ``_Child.stop`` closes it."""
    if log is not None:
        return log.open("a+", errors="replace")
    return tempfile.TemporaryFile("w+", errors="replace")


def _ends(sections: Sequence[Section], start: float, budget: float) -> dict[str, float]:
    """The end of each section's time, if all sections before it use all of theirs."""
    whole, used, ends = sum(section.share for section in sections), 0.0, {}
    for section in sections:
        used += section.share / whole
        ends[section.name] = start + budget * used
    return ends


def _collect(child: _Child, waiting: dict[str, Section], ends: dict[str, float]) -> list[Result]:
    """The results of the sections that this process began. The last one failed if the process died in it."""
    ended: list[Result] = []
    result: Result | None = None
    deadline = time.monotonic() + _START_S
    while (message := child.receive(deadline)) is not None:
        section = waiting[message["section"]]
        if "began" in message:
            result = Result(section.name, section.title)
            deadline = max(ends[section.name], message["began"]) + _GRACE_S
        elif "row" in message and result is not None:
            result.rows.append(Row(**message["row"]))
        elif result is not None:
            result.seconds, result.failed = message["seconds"], message["failed"]
            ended.append(result)
            result, deadline = None, time.monotonic() + _GRACE_S
    if result is not None:
        result.failed = child.why()
        ended.append(result)
    return ended


def _never_ran(waiting: dict[str, Section], child: _Child, seconds: float) -> Result:
    first = next(iter(waiting.values()))
    return Result(first.name, first.title, seconds=seconds, failed=child.why())


class _Child:
    """A process that reads and writes lines of JSON."""

    def __init__(self, command: Sequence[str], log: IO[str]) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._why = "the process ended without a message"
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        try:
            _open(self._process.stdin).write(json.dumps(message) + "\n")
            _open(self._process.stdin).flush()
        except BrokenPipeError:
            pass  # receive reports that it ended

    def receive(self, deadline: float) -> dict[str, Any] | None:
        """The next message. None: the process has ended, or sent no message before ``deadline``."""
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            self._why = "it hung, and the process was killed"
            return None
        if not line:
            self._why = f"the process ended with code {self._process.wait()}: {self._last_words()}"
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    def why(self) -> str:
        """Why ``receive`` returned None."""
        return self._why

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        _open(self._process.stdin).close()
        self._log.close()

    def _read(self) -> None:
        for line in _open(self._process.stdout):
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it printed nothing"


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
