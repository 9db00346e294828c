"""The start of every child process: low priority, and an end when the server ends.

``python -m server.finetune.jobs.child PARENT NICE COMMAND …`` becomes ``COMMAND …``. It is a program of its
own, since nothing of ours may run between fork and exec in a process that has threads.
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
    """Run behind serving, be the first to go when memory runs out, and die with the thread that began us.

    The threads of a step wait for the slowest of them, so a job that takes a tenth of a core takes far more
    than that from serving. At niceness 19 it therefore also gets Linux's idle class, which runs on what
    nobody else wants and gives it back at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):  # a sandbox may forbid it
            Path("/proc/self/oom_score_adj").write_text("1000")
        if nice == _LAST:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.nice(nice)
    if os.getppid() != parent:  # it died before we could ask to be told
        sys.exit(1)


def child_command(command: Sequence[str], nice: int) -> list[str]:
    """The command line that runs ``command`` as a low-priority child of this process."""
    return [sys.executable, "-m", __name__, str(os.getpid()), str(nice), *command]


if __name__ == "__main__":
    lower_priority(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])
