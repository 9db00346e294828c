"""Starts child processes with a low priority. They end when the server ends.

``python -m server.finetune.jobs.child PARENT NICE COMMAND …`` becomes ``COMMAND …``. It is a program of its
own, because Python code must not run between fork and exec in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAST = 19  # the highest niceness


def lower_priority(parent: int, nice: int) -> None:
    """Give this process a lower priority than serving, for processor time and for memory.

    The kernel kills it first when memory runs out, and when the thread that started it ends.

    The threads of an engine step wait for the slowest thread, so a job that takes a tenth of a core slows
    serving by far more than that. At niceness 19 the process therefore also gets Linux's idle class, which
    only runs on processors that are free.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):  # a sandbox may forbid it
            Path("/proc/self/oom_score_adj").write_text("1000")
        if nice == _LAST:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(nice)
    if os.getppid() != parent:  # the parent died before prctl was called
        sys.exit(1)


def child_command(command: Sequence[str], nice: int) -> list[str]:
    """The command line that runs ``command`` as a low-priority child of this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(nice), *command]


if __name__ == "__main__":
    lower_priority(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])
