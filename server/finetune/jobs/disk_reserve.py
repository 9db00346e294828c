"""Reserves disk space, so that a deletion can still be recorded when the disk is full."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 1 << 20
"""Much more than a transaction needs that deletes something or ends a job."""


class DiskReserve:
    """A file of ``RESERVE_BYTES``. It is emptied on a full disk and allocated again when there is room."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure(self) -> None:
        """Allocate the reserve if the disk has room. This is cheap while the reserve exists."""
        with suppress(OSError):
            if self._allocated() < RESERVE_BYTES:
                self._allocate()

    def release(self) -> None:
        """Free the reserve."""
        with suppress(OSError):
            os.truncate(self._path, 0)

    def disk_is_low(self) -> bool:
        """Whether a large write should stop, because less than the reserve's size is free."""
        try:
            disk = os.statvfs(self._path.parent)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize < RESERVE_BYTES

    def _allocated(self) -> int:
        try:
            return self._path.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def _allocate(self) -> None:
        with self._path.open("r+b" if self._path.exists() else "x+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
            else:
                file.write(bytes(RESERVE_BYTES))
