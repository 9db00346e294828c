"""The header of a safetensors file: names, dtypes, shapes and offsets, checked before any tensor is read.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from adapters.artifact.files import WEIGHTS_FILE, read_exactly
from adapters.artifact.strict_json import parse_object
from adapters.errors import AdapterInvalid

MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_LENGTH = 512
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file; ``begin`` and ``end`` are byte offsets behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """``raw`` are the bytes read so far; ``entries`` are in file order and cover the rest exactly."""

    raw: bytes
    entries: tuple[TensorEntry, ...]


def read_header(stream: BinaryIO, file_size: int) -> Header:
    """Reads up to the first tensor byte. Raises AdapterInvalid."""
    prefix = read_exactly(stream, 8, WEIGHTS_FILE)
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, file_size - 8):
        raise AdapterInvalid(f"{WEIGHTS_FILE} is not a safetensors file: its header claims {length} bytes.")
    text = read_exactly(stream, length, WEIGHTS_FILE)
    fields = parse_object(text, f"The header of {WEIGHTS_FILE}")
    fields.pop("__metadata__", None)
    entries = sorted((_entry(name, value) for name, value in fields.items()), key=lambda e: (e.begin, e.end))
    _check_coverage(entries, file_size - 8 - length)
    return Header(bytes(prefix + text), tuple(entries))


def _entry(name: str, value: Any) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            numbers_fit = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if numbers_fit and len(name) <= MAX_NAME_LENGTH:
                return _check_size(TensorEntry(name, dtype, tuple(shape), begin, end))
    raise AdapterInvalid(f"{WEIGHTS_FILE}: the header's entry of tensor {name!r:.100} is malformed.")


def _check_size(entry: TensorEntry) -> TensorEntry:
    if entry.dtype not in FLOAT_BYTES:
        raise AdapterInvalid(
            f"Tensor {entry.name!r} has dtype {entry.dtype}; save the adapter in {', '.join(FLOAT_BYTES)}."
        )
    expected = math.prod(entry.shape) * FLOAT_BYTES[entry.dtype]
    if entry.end - entry.begin != expected:
        raise AdapterInvalid(
            f"Tensor {entry.name!r} needs {expected} bytes but has {entry.end - entry.begin}."
        )
    return entry


def _check_coverage(entries: list[TensorEntry], size: int) -> None:
    if not entries:
        raise AdapterInvalid(f"{WEIGHTS_FILE} holds no tensors.")
    seams = [0, *(edge for entry in entries for edge in (entry.begin, entry.end)), size]
    for left, right in list(pairwise(seams))[::2]:
        if left != right:
            raise AdapterInvalid(
                f"{WEIGHTS_FILE} has {size} bytes of tensors, which its header does not "
                "describe without holes or overlaps; it is truncated or damaged."
            )
