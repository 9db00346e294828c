"""How a test run is divided between processes by ``pytest -n auto``, which ``make test`` uses.

A file goes to one worker, because its tests share fixtures. Every process that a worker starts computes on
one thread: two engines of two threads each on two processors are ten times slower than two of one thread.
Tests that need more threads set the number themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
MAX_WORKERS = 8
"""The most workers. More would wait for the longest file, and each takes 1 to 2 GiB."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MANYLORA_THREADS": "1"}
NOT_ONLY_WHEN_IDLE = {"MANYLORA_TRAIN_NICE": "0"}
"""Fine-tuning jobs run on idle processors by default, and the workers leave none idle."""
ENVIRON = ONE_THREAD | NOT_ONLY_WHEN_IDLE if IN_WORKER else {}
"""Variables for this process and its children. OpenMP reads them when torch is imported."""
ONE_SERVER = "tests/e2e"
"""The files directly in this folder share one server, so they go to one worker."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Distribute by files, in the order of collection. Long files come first, so the workers end together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return folder if folder == ONE_SERVER else file


def num_workers(arguments: list[str]) -> int:
    """One for each usable processor, or 0 (no workers) for a single file."""
    if len(arguments) == 1 and not Path(arguments[0].partition("::")[0]).is_dir():
        return 0
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, MAX_WORKERS)
