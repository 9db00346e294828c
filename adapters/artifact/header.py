"""The header of a safetensors file: names, dtypes, shapes and offsets, checked before any tensor is read.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from adapters.artifact.files import WEIGHTS_FILE, parse_object, read_exactly
from adapters.errors import AdapterInvalid
from adapters.sites import BaseLayout

MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 3
MAX_LENGTH = 2**31 - 1
"""The largest size of one dimension. A product of up to three dimensions stays a small integer."""

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_METADATA_BYTES = 2**20
_METADATA_OBJECTS = 2**14
_MODULE_TENSORS = 6
_TENSOR_BYTES = 384
"""Bytes of a long tensor name, with the prefixes of FSDP and torch.compile."""
_TENSOR_OBJECTS = 3
_COMMAS = 3
"""Commas for each object and array."""
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file. ``begin`` and ``end`` are byte offsets from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """``raw`` has the bytes read so far. ``entries`` are in file order and cover the rest exactly."""

    raw: bytes
    entries: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class HeaderLimits:
    """Caps on a header: room for all modules of the base, and for some metadata.

    Attributes:
        length: in bytes.
        objects: JSON's objects and arrays, which cost the most to read.
    """

    length: int
    objects: int


def header_limits(layout: BaseLayout) -> HeaderLimits:
    """Room for 1 MiB of metadata, and for six tensors of each module of the base.

    A module may have a pair, DoRA's vector, biases and PEFT's copies.
    """
    tensors = _MODULE_TENSORS * (len(layout.sites) + len(layout.embedding_and_head) + len(layout.norms))
    return HeaderLimits(
        min(_MAX_HEADER_BYTES, _METADATA_BYTES + tensors * _TENSOR_BYTES),
        _METADATA_OBJECTS + tensors * _TENSOR_OBJECTS,
    )


def read_header(stream: BinaryIO, file_size: int, limits: HeaderLimits) -> Header:
    """Reads up to the first tensor byte. Raises AdapterInvalid."""
    prefix = read_exactly(stream, 8, WEIGHTS_FILE)
    length = int.from_bytes(prefix, "little")
    if length > file_size - 8:
        raise AdapterInvalid(
            f"{WEIGHTS_FILE} is not a whole safetensors file: its header claims {length} bytes, and the file "
            f"has {file_size}; copy or save it again."
        )
    if length > limits.length:
        raise AdapterInvalid(
            f"The header of {WEIGHTS_FILE} has {length} bytes; at most {limits.length} are read, which is "
            "room for every module of this base. Save the adapter's own tensors only, without metadata."
        )
    text = read_exactly(stream, length, WEIGHTS_FILE)
    objects = text.count(b"[") + text.count(b"{")
    if objects > limits.objects or text.count(b",") > _COMMAS * limits.objects:
        raise AdapterInvalid(
            f"The header of {WEIGHTS_FILE} describes more tensors than this base has modules for, or is "
            "not a header; save the adapter's own tensors only."
        )
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
                _check_shape(name, shape)
                return _check_size(TensorEntry(name, dtype, tuple(shape), begin, end))
    raise AdapterInvalid(
        f"{WEIGHTS_FILE}: the header's entry of tensor {name!r:.100} is malformed; save the adapter again."
    )


def _check_shape(name: str, shape: list[int]) -> None:
    if len(shape) > MAX_DIMENSIONS or any(length > MAX_LENGTH for length in shape):
        raise AdapterInvalid(
            f"Tensor {name!r} has the shape {shape!s:.100}; at most {MAX_DIMENSIONS} dimensions of at most "
            f"{MAX_LENGTH} are read, and no tensor of LoRA has more. Leave it out, or save the adapter again."
        )


def _check_size(entry: TensorEntry) -> TensorEntry:
    if entry.dtype not in FLOAT_BYTES:
        raise AdapterInvalid(
            f"Tensor {entry.name!r} has dtype {entry.dtype}; save the adapter in {', '.join(FLOAT_BYTES)}."
        )
    expected = math.prod(entry.shape) * FLOAT_BYTES[entry.dtype]
    if entry.end - entry.begin != expected:
        raise AdapterInvalid(
            f"Tensor {entry.name!r} needs {expected} bytes but has {entry.end - entry.begin}; "
            "save the adapter again."
        )
    return entry


def _check_coverage(entries: list[TensorEntry], size: int) -> None:
    if not entries:
        raise AdapterInvalid(f"{WEIGHTS_FILE} contains no tensors; save the adapter again.")
    seams = [0, *(edge for entry in entries for edge in (entry.begin, entry.end)), size]
    for left, right in list(pairwise(seams))[::2]:
        if left != right:
            raise AdapterInvalid(
                f"{WEIGHTS_FILE} has {size} bytes of tensors, but the tensors in its header "
                "leave holes or overlap; the file is truncated or damaged, so copy or save it again."
            )
