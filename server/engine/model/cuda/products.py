"""Products of NF4 weights, and which of them is the quickest for so many rows. Decided by what a GPU took.

``bitsandbytes`` is its operation, which chooses between a kernel for few rows and dequantising by a table
that was tuned once per kind of GPU. ``dense`` dequantises in any case. ``triton`` is ours
(``kernels/nf4.py``), which reads 4-bit weights once for up to 128 rows. Where nothing was measured it is the
first.
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
"""For which is measured; those between do as the next larger does."""

USUAL, OURS = "bitsandbytes", "triton"
_CLEARLY = 0.97
"""Of what the usual one takes: less is no noise, so that two starts choose alike."""


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A matrix [outputs, inputs] in 4 bits.

    Attributes:
        packed: uint8, row by row, two a byte, the first in the high nibble.
        scales: float32, of each ``blocksize`` weights of a row.
        code: float32 [16], what a nibble stands for.
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
"""x [rows, inputs], with the bias of x's type -> [rows, outputs]."""


def dispatched(weight: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """As bitsandbytes chooses."""
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
    """Names of what can compute so many rows with weights of this kind."""
    if find_spec("triton") is None:
        return [USUAL, "dense"]
    from server.engine.kernels import nf4

    reason = nf4.why_not(weight.inputs, weight.blocksize, weight.quant_type)
    fits = reason is None and rows <= nf4.MOST_ROWS
    return [USUAL, "dense", *([OURS] if fits else [])]


def quickest(seconds: Mapping[str, float]) -> str:
    """The name of the one that took least, if that is clearly less than the usual one.

    Args:
        seconds: by name; the usual one is among them.
    """
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < _CLEARLY * seconds[USUAL] else USUAL


@dataclass(frozen=True, slots=True)
class Choice:
    """Which product for how many rows.

    Attributes:
        names: by ``ROWS``; empty = nothing was measured.
        refused: why ours is not among them, though it is for such weights.
    """

    names: Sequence[str] = ()
    refused: str = ""

    def of(self, rows: int) -> str:
        """The name for so many rows; beyond all that was measured, the usual one."""
        place = bisect_left(ROWS, rows)
        return self.names[place] if place < len(self.names) else USUAL

    def __str__(self) -> str:
        """E.g. "triton to 64 rows, dense to 512"."""
        ends = [
            f"{name} to {rows}"
            for rows, name, following in zip(ROWS, self.names, [*self.names[1:], ""], strict=False)
            if name != following
        ]
        return ", ".join([f"{ends[0]} rows", *ends[1:]]) if ends else USUAL
