"""The state of one sub-folder between two scans, and the list of all sub-folders. Opens no file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adapters.paths import UNFINISHED_SUFFIXES
from adapters.watcher.signature import Signature

INCOMPLETE_AFTER = 30.0
"""Seconds after which a folder that lacks a file is listed as failed."""


@dataclass(slots=True)
class WatchedFolder:
    """One folder as of the last scan.

    Attributes:
        name: the adapter's name.
        since: when this signature was first seen (monotonic seconds).
        stable: whether it was seen twice, or was already old in the first scan.
        done: whether this signature was read, with success or not, or need not be read.
        slow: whether reading it took longer than a scan allows.
        refused: whether it cannot be served whatever its files contain.
    """

    name: str
    path: Path
    inode: int
    signature: Signature
    since: float
    stable: bool
    done: bool = False
    slow: bool = False
    refused: bool = False

    def is_due(self, now: float) -> bool:
        """Whether to read it now.

        A folder that lacks a file is read later, to find the reason for the list.
        """
        complete = None not in self.signature
        return self.stable and not self.done and (complete or now - self.since >= INCOMPLETE_AFTER)


def list_folders(root: Path) -> dict[str, int]:
    """The names and inodes of the sub-folders that may be meant as adapters. Raises OSError."""
    with os.scandir(root) as entries:
        return {entry.name: entry.inode() for entry in entries if is_candidate(entry)}


def is_candidate(entry: os.DirEntry[str]) -> bool:
    """Whether an entry may be meant as an adapter. If it cannot be served, it is listed with the reason.

    Links to folders count too, also broken and circular ones.
    """
    if entry.name.startswith(".") or entry.name.endswith(UNFINISHED_SUFFIXES):
        return False
    try:
        return entry.is_dir() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def ignores_case(path: Path) -> bool:
    """Whether the file system ignores case. Then only a listing shows the real name of the folder."""
    try:
        return path.name != path.name.swapcase() and path.with_name(path.name.swapcase()).samefile(path)
    except OSError:
        return False
