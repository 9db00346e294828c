"""The state of an adapter's folder without opening a file: what its files look like, and whether they are
complete.

A folder is read only when its files are complete, so half-written files are never read.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from adapters.artifact.chat_config import CHAT_CONFIG_FILES
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE

SETTLED_AGE = 1.0
"""Seconds without a write after which files count as complete."""

FILES = (CONFIG_FILE, WEIGHTS_FILE)
FileSignature = tuple[int, ...]
Signature = tuple[FileSignature | None, ...]
"""Inode, size in bytes, and times of the last write and the last change (ns) of each file.

None = the file is missing; empty = the file is missing and optional.
"""


def signature_of(folder: str) -> Signature:
    """If two signatures are equal, nothing was written in between."""
    needed = [_of_file(f"{folder}/{name}") for name in FILES]
    return (*needed, *(_of_file(f"{folder}/{name}") or () for name in CHAT_CONFIG_FILES))


def size_of(signature: Signature) -> int:
    """The size of all files, in bytes."""
    return sum(file[1] for file in signature if file)


def why_not_finished(folder: Path, signature: Signature) -> str:
    """A sentence that says why the folder is not read yet."""
    missing = [name for name, file in zip(FILES, signature, strict=False) if file is None]
    if not missing:
        return "Its files may still be written to. They are read when they have stopped changing."
    try:
        with os.scandir(folder):
            return f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not there yet."
    except OSError as error:
        return f"The folder cannot be opened ({error.strerror})."


def is_settled(signature: Signature) -> bool:
    """Whether nothing was written for ``SETTLED_AGE`` seconds.

    It uses change times, which copying cannot set.
    """
    return time.time() - _last_change(signature) / 1e9 >= SETTLED_AGE


def was_renamed(folder: str, signature: Signature) -> bool:
    """Whether the folder was renamed after its files were written, so it is complete.

    A rename sets only the folder's change time. So that time is later than the last new file in the folder,
    and no file has changed since.
    """
    try:
        status = os.stat(folder, follow_symlinks=False)
    except OSError:
        return False
    return status.st_ctime_ns > status.st_mtime_ns and status.st_ctime_ns >= _last_change(signature)


def _of_file(path: str) -> FileSignature | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _last_change(signature: Signature) -> int:
    return max((file[3] for file in signature if file), default=0)
