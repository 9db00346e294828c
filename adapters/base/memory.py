"""Whether a base fits into memory and onto the disk. What does not is refused before anything is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from adapters.base.headers import read_headers
from adapters.errors import BaseTooLarge

_GROUP = Path("/sys/fs/cgroup")


def check_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises BaseTooLarge, with the bytes that are missing, if ``device`` has less than ``needed`` free.

    Args:
        what: the subject of the sentence that the text begins with.
        remedy: a sentence.
    """
    if device.type == "cuda":
        _check(needed, torch.cuda.mem_get_info(device)[0], f"memory of the GPU {device}", what, remedy)
    elif device.type == "cpu":
        _check(needed, free_memory(), "memory", what, remedy)


def check_disk(needed: int, folder: Path, what: str) -> None:
    """Raises BaseTooLarge if the disk of ``folder`` has less than ``needed`` bytes free."""
    remedy = "Free some, or give --home a folder on another disk."
    _check(needed, shutil.disk_usage(folder).free, f"disk space at {folder}", what, remedy)


def loaded_bytes(folder: Path) -> int:
    """Bytes of a base's weights in memory, where all but the scales of 4-bit weights is at most bf16.

    Raises BaseCorrupt.
    """
    return sum(
        header.nbytes // 2 if header.dtype == "F32" and ".weight." not in name else header.nbytes
        for name, header in read_headers(folder).items()
    )


def free_memory() -> int:
    """Bytes that this process may still take, by the machine's memory or its cgroup's limit if that is
    lower."""
    machine = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return machine if limit == "max" else min(machine, int(limit) - int(used) + _cached())
    except (OSError, ValueError):
        return machine


def _cached() -> int:
    """Bytes of files in the cgroup's memory. The kernel drops them when memory is needed."""
    lines = (line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))


def _check(needed: int, free: int, place: str, what: str, remedy: str) -> None:
    if needed > free:
        raise BaseTooLarge(
            f"{what} takes {_gb(needed)}, but {_gb(free)} of {place} is free: "
            f"{_gb(needed - free)} is missing. {remedy}"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB ({size} bytes)"
