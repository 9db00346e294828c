"""Products of NF4 weights, and the choice of the quickest for each number of rows, by measurement.

``bitsandbytes`` is its own operation. It chooses between a kernel for few rows and dequantising, by a table
that was tuned for each kind of GPU. ``dense`` always dequantises. ``triton`` is ours (``kernels/nf4.py``),
which reads the 4-bit weights once for up to 128 rows. Without measurements ``bitsandbytes`` is used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Row counts that are measured. A count in between uses the next larger one's choice."""

USUAL, OURS = "bitsandbytes", "triton"
_CLEARLY = 0.97
"""A product must take less than this share of the usual one's time, so that noise does not decide."""


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A matrix [outputs, inputs] in 4 bits.

    Attributes:
        packed: uint8, row by row, two weights in each byte, the first in the high nibble.
        scales: float32, one for each ``blocksize`` weights of a row.
        code: float32 [16], the value of each nibble.
        quant_type: "nf4" or "fp4".
    """

    packed: Tensor
    scales: Tensor
    code: Tensor
    outputs: int
    inputs: int
    blocksize: int
    quant_type: str

    @cached_property
    def shape(self) -> list[int]:
        return [self.outputs, self.inputs]


Product = Callable[[Nf4Weight, Tensor, Tensor | None], Tensor]
"""(weight, x [rows, inputs], bias of x's dtype or None) -> [rows, outputs]."""


def dispatched(weight: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel that bitsandbytes chooses."""
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, weight.packed, weight.shape, weight.scales, weight.blocksize, weight.quant_type, bias=bias
    )
    return y


def dequantised(weight: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, weight.scales, weight.blocksize, weight.quant_type, weight.shape, x.dtype
    )
    return linear(x, dense, bias)


def in_triton(weight: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    from server.engine.kernels import nf4

    return nf4.product(x, weight.packed, weight.scales, weight.code, weight.outputs, bias)


PRODUCTS: dict[str, Product] = {USUAL: dispatched, "dense": dequantised, OURS: in_triton}


def candidates(weight: Nf4Weight, rows: int) -> list[str]:
    """Names of the products that can compute this number of rows with this weight."""
    if find_spec("triton") is None:
        return [USUAL, "dense"]
    from server.engine.kernels import nf4

    unsupported = nf4.check_weight(weight.inputs, weight.blocksize, weight.quant_type)
    fits = unsupported is None and rows <= nf4.MOST_ROWS
    return [USUAL, "dense", *([OURS] if fits else [])]


def quickest(seconds: Mapping[str, float]) -> str:
    """The name of the quickest product, if it is clearly quicker than the usual one.

    Args:
        seconds: by name, with the usual one among them.
    """
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _CLEARLY * seconds[USUAL] else USUAL


@dataclass(frozen=True, slots=True)
class Choice:
    """The product for each number of rows.

    Attributes:
        names: one for each of ``ROWS``; empty = nothing was measured.
        refused: why our product is not used although it supports these weights; empty = it may be used.
    """

    names: Sequence[str] = ()
    refused: str = ""

    def of(self, rows: int) -> str:
        """The name for this number of rows; the usual one beyond the measured counts."""
        index = bisect_left(ROWS, rows)
        return self.names[index] if index < len(self.names) else USUAL

    def __str__(self) -> str:
        """E.g. "triton to 64 rows, dense to 512"."""
        ends = [
            f"{name} to {rows}"
            for rows, name, following in zip(ROWS, self.names, [*self.names[1:], ""], strict=False)
            if name != following
        ]
        return ", ".join([f"{ends[0]} rows", *ends[1:]]) if ends else USUAL
