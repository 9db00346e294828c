"""The memory that a server takes, read from Linux's /proc when it is asked for.

A server may be several processes. Its figures are sums over its first process and all descendants.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from server.bench.serving.stats import Metrics

_MIB_IN_KIB = 1 / 1024


def memory_of(pid: int, proc: Path = Path("/proc")) -> Metrics:
    """Memory of the process ``pid`` and its descendants, in MiB. Empty without /proc.

    ``memory_mib`` is what they hold now; each shared page counts once (proportional set size).
    ``peak_memory_mib`` is the most that was resident since they started, loading included. For several
    processes it is an upper bound: it counts shared pages in each, and their peaks need not coincide.
    """
    now = peak = 0
    for one in tree(pid, proc):
        now += _field(proc / str(one) / "smaps_rollup", "Pss")
        peak += _field(proc / str(one) / "status", "VmHWM")
    return {"memory_mib": now * _MIB_IN_KIB, "peak_memory_mib": peak * _MIB_IN_KIB} if peak else {}


def tree(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """``pid`` and its living descendants."""
    children = defaultdict(list)
    for folder in proc.glob("[0-9]*"):
        children[_parent(folder)].append(int(folder.name))
    found = [pid]
    for one in found:
        found += children[one]
    return found


def _parent(folder: Path) -> int:
    """The parent of a process; 0 if it has ended meanwhile."""
    try:
        # The command's name is in brackets, and may itself contain brackets and spaces.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _field(file: Path, name: str) -> int:
    """The number in the line ``Name:  123 kB``; 0 if the process has ended or there is no such line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
