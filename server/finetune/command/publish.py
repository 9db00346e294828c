"""Putting a finished adapter where a server looks: whole, at once, in the place of an old one.

It is copied beside its place under a name that the watcher passes over, and moved there by one rename. An old
version is exchanged with it in one system call, so that no look ever finds the name without a folder.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adapters.errors import AdapterExists
from adapters.paths import check_name, folder_name
from adapters.training.run_folder import sync_folder
from server.finetune.command.provenance import Producer

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def publish(folder: Path, output_dir: Path, name: str, by: Producer | None = None) -> Path:
    """Copy ``folder`` to the place of the adapter ``name`` in ``output_dir``.

    ``by`` is the fine-tuning job whose result it is, if it is one's: such replace other jobs' results alone.

    Raises:
        AdapterNameInvalid: the name is not allowed.
        AdapterExists: something that is no folder has the name, or a folder that no job has made.
    """
    target = output_dir / folder_name(check_name(name))
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise AdapterExists(
            f"{name!r} is taken by something that is no folder; remove it, or choose another."
        )
    if target.exists() and not _may_replace(target, name, by):
        raise _not_ours(name)
    output_dir.mkdir(parents=True, exist_ok=True)
    staged = output_dir / f".{target.name}.tmp"
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    try:
        shutil.copytree(folder, staged)
        if by is not None:
            by.mark(staged, name)
        sync_folder(staged)
        if not _move(staged, target, partial(_may_replace, name=name, by=by)):
            raise _not_ours(name)
        _sync(output_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # the old version, or what an error left
    return target


def _may_replace(folder: Path, name: str, by: Producer | None) -> bool:
    return by is None or by.provenance.job_of(folder, name) is not None


def _not_ours(name: str) -> AdapterExists:
    return AdapterExists(
        f"{name!r} is taken by a folder that no fine-tuning job has made, which is left as it is; choose "
        "another name, or remove that folder from the adapter folder."
    )


def _move(staged: Path, target: Path, may_replace: Callable[[Path], bool]) -> bool:
    """False, and nothing has changed, if what came to the place meanwhile may not be replaced."""
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
    """``renameat2`` in one system call; False where the system or its disk cannot, or something is there."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
