"""Putting a finished adapter where a server looks: whole, at once, in the place of an old one.

It is copied beside its place under a name that the watcher passes over, and moved there by one rename. An old
version is exchanged with it in one system call, so that no look ever finds the name without a folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from adapters.errors import AdapterExists
from adapters.paths import check_name
from adapters.training.run_folder import sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def publish(folder: Path, output_dir: Path, name: str) -> Path:
    """Copy ``folder`` to ``output_dir/name``.

    Raises:
        AdapterNameInvalid: the name is not allowed.
        AdapterExists: something that is no folder has the name.
    """
    target = output_dir / check_name(name)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise AdapterExists(f"{target} is in the way: it is no folder; remove it, or choose another --name.")
    output_dir.mkdir(parents=True, exist_ok=True)
    staged = output_dir / f".{name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    try:
        shutil.copytree(folder, staged)
        sync_folder(staged)
        _move(staged, target)
        _sync(output_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # the old version, or what an error left
    return target


def _move(staged: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staged, target)
    elif not _exchange(staged, target):
        aside = staged.with_suffix(".old.tmp")
        os.rename(target, aside)
        os.rename(staged, target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one system call; False where the system or its disk cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
