"""The tensors of a transformers folder, from the headers of its safetensors files. No tensor is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adapters.errors import BaseCorrupt

_SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor of a file. ``dtype`` is safetensors' name for it (``BF16``)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Types of less than 16 bits count as 8."""
        numbers = 1
        for size in self.shape:
            numbers *= size
        return numbers * _BITS.get(self.dtype, 8) // 8


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: the single one, or else those that the index names.

    Raises:
        BaseCorrupt: there are neither, or the index cannot be read.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / INDEX
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseCorrupt(
            f"{folder} has neither {_SINGLE} nor an index of its weights that can be read ({error!r}); "
            "fetch it again."
        ) from error


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor by its name in the files.

    Raises:
        BaseCorrupt: a file is missing, shorter than its header says, or not safetensors.
    """
    found: dict[str, Header] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is not a dict
                    tensor = opened.get_slice(name)
                    found[name] = Header(file, tensor.get_dtype(), tuple(tensor.get_shape()))
        except (OSError, SafetensorError) as error:
            raise BaseCorrupt(f"{file} cannot be read as safetensors ({error}); fetch it again.") from error
    return found
