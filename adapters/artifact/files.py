"""Reads an adapter's two files, each once, through descriptors that do not follow links.

Sizes come from ``fstat`` of the descriptor that is read, so swapping the file in between has no effect.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import AdapterChanged, AdapterError, AdapterInvalid, AdapterTooLarge
from adapters.strict_json import JsonInvalid, parse_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of the folder; files are opened relative to it. Raises AdapterInvalid."""
    try:
        descriptor = os.open(folder, _FLAGS | os.O_DIRECTORY)
    except OSError as error:
        raise AdapterInvalid(
            f"The adapter folder cannot be opened ({_reason(error)}); it must be a real folder, not a link."
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_file(folder: int, name: str, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """One regular file and its size in bytes.

    Raises:
        AdapterInvalid: it is missing, a link, or not a regular file.
        AdapterTooLarge: it has more than ``max_bytes``; nothing was read.
        AdapterChanged: it was written to while it was read.
    """
    try:
        descriptor = os.open(name, _FLAGS, dir_fd=folder)
    except OSError as error:
        raise _cannot_open(name, error) from error
    before = os.fstat(descriptor)
    try:
        _check_file(name, before, max_bytes)
    except AdapterError:
        os.close(descriptor)
        raise
    with open(descriptor, "rb", buffering=0) as stream:
        yield stream, before.st_size
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise AdapterChanged(
                f"{name} was written to while it was read; deploy adapters by renaming a folder."
            )


def read_exactly(stream: BinaryIO, size: int, name: str) -> bytearray:
    """``size`` bytes from the stream. Raises AdapterInvalid if the file ends earlier."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise AdapterInvalid(f"{name} ends {size - filled} bytes early; it is truncated.")
        filled += got
    return data


def read_file(folder: int, name: str, max_bytes: int) -> bytes:
    """The content of a small file. Raises like ``open_file``."""
    with open_file(folder, name, max_bytes) as (stream, size):
        return bytes(read_exactly(stream, size, name))


def parse_object(data: bytes | bytearray, what: str) -> dict[str, Any]:
    """The JSON object in ``data``. Raises AdapterInvalid, which names ``what``."""
    try:
        return parse_json_object(data)
    except JsonInvalid as error:
        raise AdapterInvalid(f"{what} {error}.") from error


def _check_file(name: str, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise AdapterInvalid(f"{name} is not a regular file; copy a real file there.")
    if status.st_size > max_bytes:
        raise AdapterTooLarge(f"{name} has {status.st_size} bytes; at most {max_bytes} are allowed.")


def _cannot_open(name: str, error: OSError) -> AdapterInvalid:
    if isinstance(error, FileNotFoundError):
        return AdapterInvalid(f"{name} is missing; a PEFT folder has {CONFIG_FILE} and {WEIGHTS_FILE}.")
    return AdapterInvalid(
        f"{name} cannot be opened ({_reason(error)}); it must be a regular file, not a link. Copy the "
        "files that the links point to (cp -rL), or fetch it with 'hf download … --local-dir <folder>'."
    )


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
