"""Section ``nf4_products``: bitsandbytes' product of few rows against its dense one, by rows and shape.

Which of the two its operation takes is decided by a table that it was tuned with; this is what the card says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from server.bench.gpu_check.context import Context
from server.bench.gpu_check.rows import Row, Skip, Value
from server.bench.gpu_check.timing import seconds_of

_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate/up": (28672, 4096), "down": (4096, 14336)}
"""[out_features, in_features] of an 8B model's joined products."""

_PAST_CACHE = 256e6
"""Bytes of copies of a weight that no cache holds."""

_EXACT = 2e-2
_SLACK = 1.05
"""What one may take more than the other and still be as quick."""


def run(context: Context) -> Iterator[Row]:
    """By shape and rows: whether both agree and what each takes; then where the dense one is quicker."""
    if find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    shapes, counts = (_SHAPES, _ROWS) if context.gpu else ({"small": (256, 128)}, (1, 8))
    for name, (outputs, inputs) in shapes.items():
        copies = max(1, int(_PAST_CACHE / (outputs * inputs / 2))) if context.gpu else 1
        weights = [_Weight(outputs, inputs, context.device) for _ in range(copies)]
        rows = []
        for count in counts:
            context.check_time()
            rows.append(_row(context, name, weights, count))
            yield rows[-1]
        if context.gpu is not None:
            yield _threshold(name, rows)


class _Weight:
    """NF4 with float32 scales, as the fused step keeps it."""

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        from bitsandbytes.functional import quantize_4bit

        dense = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(torch.bfloat16)
        self.packed, self.state = quantize_4bit(dense, quant_type="nf4", compress_statistics=False)
        self.shape = [outputs, inputs]

    def dispatched(self, x: Tensor) -> Tensor:
        """The operation, which chooses by itself."""
        return self._product(torch.ops.bitsandbytes.gemm_4bit, x)

    def fused(self, x: Tensor) -> Tensor:
        """The kernel that it takes for few rows."""
        return self._product(_fused_kernel(), x)

    def dense(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return linear(x, dequantize_4bit(self.packed, self.state))

    def _product(self, operation: Callable[..., Tensor], x: Tensor) -> Tensor:
        state = self.state
        return operation(x, self.packed, self.shape, state.absmax, state.blocksize, state.quant_type)


def _fused_kernel() -> Any:
    """bitsandbytes has no public name for it; a version without it has no column for it."""
    return getattr(import_module("bitsandbytes.backends.cuda.ops"), "_gemm_4bit_kernel_impl", None)


def _row(context: Context, name: str, weights: list[_Weight], count: int) -> Row:
    x = torch.randn(count, weights[0].shape[1], device=context.device).to(torch.bfloat16)
    got, expected = weights[0].dispatched(x).float(), weights[0].dense(x).float()
    wrong = ((got - expected).abs() > _EXACT * (1 + expected.abs())).sum().item()
    values: dict[str, Value] = {"product": name, "rows": count}
    if context.gpu is not None:
        forms = ["dispatched", "dense", *(["fused"] if _fused_kernel() else [])]
        for form in forms:
            took = seconds_of([lambda w=w, f=form: getattr(w, f)(x) for w in weights])  # type: ignore[misc]
            values[f"{form} us"] = round(took * 1e6, 1)
        best = min(float(values[f"{form} us"]) for form in forms)
        values["chosen well"] = float(values["dispatched us"]) <= _SLACK * best
    return Row("products", values, f"{wrong} of {got.numel()} values differ" if wrong else "")


def _threshold(name: str, rows: list[Row]) -> Row:
    """From how many rows on the dense product is the quicker one, and whether the choice was right."""
    timed = [row.values for row in rows if "fused us" in row.values]
    first = next((int(v["rows"]) for v in timed if float(v["dense us"]) < float(v["fused us"])), 0)
    badly = [str(row.values["rows"]) for row in rows if not row.values["chosen well"]]
    values: dict[str, Value] = {
        "product": name,
        "dense is quicker from": first or "no measured number of rows",
        "badly chosen at": ", ".join(badly) or "none",
    }
    return Row("thresholds", values)
