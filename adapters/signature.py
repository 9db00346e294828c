"""An adapter's folder as seen from outside: what its files look like, and whether they are finished.

Opens nothing. A folder is read only when it is finished, so that half-written files never are.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from adapters.artifact.chat_config import CHAT_CONFIG_FILES
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE

SETTLED_AGE = 1.0
"""Files untouched for so many seconds count as finished."""

FILES = (CONFIG_FILE, WEIGHTS_FILE)
FileSignature = tuple[int, ...]
Signature = tuple[FileSignature | None, ...]
"""Inode, size in bytes, time of the last write and of the last change (ns) of each file.

None = it is not there; empty = nor need it be.
"""


def signature_of(folder: str) -> Signature:
    """Two equal ones mean that nothing was written in between."""
    needed = [_of_file(f"{folder}/{name}") for name in FILES]
    return (*needed, *(_of_file(f"{folder}/{name}") or () for name in CHAT_CONFIG_FILES))


def size_of(signature: Signature) -> int:
    """Bytes of all files."""
    return sum(file[1] for file in signature if file)


def why_not_finished(folder: Path, signature: Signature) -> str:
    """What the folder is waited for, as a sentence."""
    missing = [name for name, file in zip(FILES, signature, strict=False) if file is None]
    if not missing:
        return "Its files may still be written to; they are read once they stand still."
    try:
        with os.scandir(folder):
            return f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not there yet."
    except OSError as error:
        return f"The folder cannot be opened ({error.strerror})."


def is_settled(signature: Signature) -> bool:
    """Whether nothing was written for ``SETTLED_AGE`` seconds, by change times: copying cannot set them."""
    return time.time() - _last_change(signature) / 1e9 >= SETTLED_AGE


def was_renamed(folder: str, signature: Signature) -> bool:
    """Whether the folder came by a rename after its files were written: then it came whole.

    A rename sets the folder's change time alone. So it is later than the folder's last new file, and no file
    has changed since.
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
