"""Waits until folders and files are on disk, so that a crash of the machine cannot lose them."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and its files are on disk, so that a rename is never visible before them."""
    for path in (*folder.iterdir(), folder):
        sync_path(path)
