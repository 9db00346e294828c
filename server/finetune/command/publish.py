"""Publishes a finished adapter in the adapter folder. It may replace an old version. Both are atomic.

The folder is copied under a name that the watcher ignores and is then renamed. An old version is exchanged
with it in one system call, so that the name always has a folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adapters.errors import AdapterExists
from adapters.fsync import sync_folder, sync_path
from adapters.paths import check_name, folder_name
from server.finetune.command.provenance import Producer

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def publish(folder: Path, output_dir: Path, name: str, by: Producer | None = None) -> Path:
    """Copy ``folder`` to the folder of the adapter ``name`` in ``output_dir``. Returns the path.

    Args:
        by: the job that made the adapter; None = the operator did. A job replaces only adapters of jobs.

    Raises:
        AdapterNameInvalid: the name is not allowed.
        AdapterExists: the name belongs to something that is not a folder, or to a folder that no job made.
    """
    target = output_dir / folder_name(check_name(name))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise AdapterExists(
            f"{name!r} is taken by something that is not a folder; remove it, or choose another name."
        )
    if target.exists() and not _may_replace(target, name, by):
        raise _not_ours(name)
    output_dir.mkdir(parents=True, exist_ok=True)
    staged = output_dir / f".{target.name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)  # left by a process that was killed
    try:
        shutil.copytree(folder, staged)
        if by is not None:
            by.mark(staged, name)
        sync_folder(staged)
        if not _move(staged, target, partial(_may_replace, name=name, by=by)):
            raise _not_ours(name)
        sync_path(output_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # the old version, or a partial copy after an error
    return target


def _may_replace(folder: Path, name: str, by: Producer | None) -> bool:
    return by is None or by.provenance.job_of(folder, name) is not None


def _not_ours(name: str) -> AdapterExists:
    return AdapterExists(
        f"{name!r} is taken by a folder that no fine-tuning job has made; choose another name, or remove "
        "that folder from the adapter folder."
    )


def _move(staged: Path, target: Path, may_replace: Callable[[Path], bool]) -> bool:
    """Move ``staged`` to ``target``. False, without a change, if it may not replace what is there now."""
    if not target.exists() and _rename(staged, target, _RENAME_NOREPLACE):
        return True
    if _rename(staged, target, _RENAME_EXCHANGE):
        if may_replace(staged):
            return True
        return not _rename(staged, target, _RENAME_EXCHANGE)
    aside = staged.with_suffix(".old.tmp")
    if target.exists():
        os.rename(target, aside)
    if aside.exists() and not may_replace(aside):
        os.rename(aside, target)
        return False
    os.rename(staged, target)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _rename(one: Path, other: Path, flag: int) -> bool:
    """Calls ``renameat2``. False if the system or the disk does not support it, or if ``other`` exists."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0)
