"""Hide keys and state from child processes, from ``ps`` and from other users."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path

from server.config import HttpConfig
from server.config.options import OPTIONS
from server.config.values import key

logger = logging.getLogger("manylora.serve")

_KEY_FLAGS = frozenset(option.flag.encode() for option in OPTIONS if option.parse is key)
_PRIVATE = ("state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm", "files", "jobs")
"""Files and folders with clients' data in the state folder."""


def keys_of(config: HttpConfig) -> frozenset[str]:
    """All keys of a server."""
    alone = (config.admin_key, config.metrics_key)
    return frozenset((*config.api_keys, *(each for each in alone if each is not None)))


def forget_keys(environ: MutableMapping[str, str], keys: Iterable[str]) -> None:
    """Remove each variable that contains one of ``keys``. Child processes inherit the other variables."""
    known = frozenset(keys)
    for name, value in list(environ.items()):
        if known & set(re.split(r"[,\s]+", value)):
            del environ[name]


def hide_typed_keys() -> None:
    """Overwrite the keys on this process's command line, and log a warning. Every user could read them."""
    hidden = False
    with suppress(OSError, ValueError, IndexError):  # only Linux allows this
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        if 0 < start < end:
            hidden = _blank(start, end)
    if hidden:
        logger.warning(
            "a key was on the command line, where other users could read it until now; "
            "use a file (--api-key-file) or a variable (MANYLORA_API_KEY)"
        )


def _blank(start: int, end: int) -> bool:
    """Overwrite keys with ``x`` in the memory from ``start`` to ``end``; whether there were any."""
    place, is_key, found = start, False, False
    for word in ctypes.string_at(start, end - start).split(b"\0"):
        flag, equals, _ = word.partition(b"=")
        first = 0 if is_key else len(flag) + 1 if equals and flag in _KEY_FLAGS else len(word)
        ctypes.memset(place + first, ord("x"), len(word) - first)
        found = found or first < len(word)
        is_key = word in _KEY_FLAGS
        place += len(word) + 1
    return found


def make_private(home: Path) -> None:
    """Make the state folder, and all files that are written later, accessible to this user only.

    A folder of another owner (a mounted volume) is not changed. Raises OSError if the folder cannot be made.
    """
    os.umask(0o077)
    home.mkdir(parents=True, exist_ok=True)
    for path in (home, *(home / name for name in _PRIVATE)):
        with suppress(FileNotFoundError):
            _close_to_others(path)


def _close_to_others(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if not mode & 0o077:
        return
    try:
        path.chmod(mode & 0o700)
    except PermissionError:
        fields = {"path": str(path), "mode": oct(mode)}
        logger.warning(
            "other users can read the state folder, and another user owns it", extra={"fields": fields}
        )
