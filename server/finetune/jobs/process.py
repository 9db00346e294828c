"""Starts and stops a training process, and recognises it after a restart of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from server.finetune.jobs.child import child_command

_GONE_SECONDS = 10.0


class Child:
    """A running training process.

    Attributes:
        identity: ``pid:start time``, by which a later server recognises this process.
        started: monotonic seconds.
    """

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str], nice: int) -> None:
        """Start the process in its own process group. Its output is appended to ``log``. Raises OSError."""
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                child_command(command, nice),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                # A process group of its own, so that signals reach all its processes, but not a session of
                # its own: Linux divides the processors among sessions first (autogroups), so niceness would
                # have no effect against the server.
                process_group=0,
            )
        self.started = time.monotonic()
        self.identity = f"{self._process.pid}:{_start_time(self._process.pid)}"
        self._kill_at: float | None = None

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        return self._process.poll()

    @property
    def stop_requested(self) -> bool:
        """Whether ``stop`` was called."""
        return self._kill_at is not None

    def stop(self, grace_seconds: float) -> None:
        """Ask the process to end at a checkpoint.

        Call it repeatedly. It kills the process when ``grace_seconds`` have passed.
        """
        now = time.monotonic()
        if self._kill_at is None:
            self._kill_at = now + grace_seconds
            self._signal(signal.SIGTERM)
        elif now >= self._kill_at:
            self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def kill_orphan(identity: str) -> None:
    """Kill the process of an earlier server if it still runs. ``identity`` is that of its ``Child``."""
    pid, _, started = identity.partition(":")
    deadline = time.monotonic() + _GONE_SECONDS
    while started and _start_time(int(pid)) == started and time.monotonic() < deadline:
        with suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _start_time(pid: int) -> str:
    """Clock ticks from boot to the start of the process; "" if it does not run, or without ``/proc``."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] == "Z" else after_name[19]
