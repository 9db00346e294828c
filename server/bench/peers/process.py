"""A child process with a log. It is always ended, with its own children."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from server.bench.errors import BenchError

_STOP_TIMEOUT_S = 30.0


class ChildProcess:
    """A running command and its children.

    Args:
        log: gets stderr, and stdout without ``talk``.
        talk: standard input and output are pipes, for ``ask``.
        environment: variables that are added to those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        talk: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        with log.open("wb") as sink:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else sink,
                stderr=sink,
                env=_environment() | dict(environment or {}),
                text=True,
                start_new_session=True,  # a group of its own, so that stop ends its children too
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ask(self, line: str) -> str:
        """Write a line and read a line. Raises ``BenchError`` if the process has ended."""
        try:
            _open(self._popen.stdin).write(line + "\n")
            _open(self._popen.stdin).flush()
            answer = _open(self._popen.stdout).readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise BenchError(f"{self._log.stem} ended before it answered; its log ends:\n{self.log_tail()}")
        return answer

    def check_alive(self) -> None:
        """Raises ``BenchError`` if the process has ended."""
        code = self._popen.poll()
        if code is not None:
            raise BenchError(f"{self._log.stem} ended with code {code}; its log ends:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """Send SIGTERM, wait, then kill the process and its children."""
        self._popen.terminate()
        try:
            self._popen.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe:
                pipe.close()


def cores() -> list[int]:
    """The cores that this process and its children may run on."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def _environment() -> dict[str, str]:
    """This process' variables without MANYLORA_…, which would configure the server that is measured."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MANYLORA_")}


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "made with talk=True"
    return pipe
