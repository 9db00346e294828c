"""Section ``nf4_products``: the products of NF4 weights from which a server chooses, by rows and shape.

Compares each with weights that plain torch decoded. On a GPU it also measures each time beside the floor,
shows which one a server would choose (``server/engine/model/cuda/products.py``), and where bitsandbytes
chooses a slow one. Our own product needs only Triton, so it is checked without bitsandbytes too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from server.bench.gpu_check.context import Context, Gpu
from server.bench.gpu_check.rows import Row, Skip, Value, skipped
from server.bench.gpu_check.timing import seconds_of
from server.bench.roofline import WEIGHT_BYTES, Work
from server.engine.model.cuda.products import (
    OURS,
    PRODUCTS,
    ROWS,
    USUAL,
    Choice,
    Nf4Weight,
    Product,
    candidates,
    quickest,
)

_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate/up": (28672, 4096), "down": (4096, 14336)}
"""The [out_features, in_features] of an 8B model's joined linears."""

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4's code book."""

_BLOCKSIZE = 64
_PAST_CACHE = 256e6
"""The bytes of all copies of a weight together: more than any cache holds."""

_ROUNDS = 10
_EXACT = 2e-2
_SLACK = 1.05
"""Two times within this factor count as equal."""

_FUSED = "fused"
"""bitsandbytes' kernel for few rows. A server never calls it directly."""


def run(context: Context) -> Iterator[Row]:
    """For each shape and number of rows: whether all agree, and their times. Then the choices."""
    able = _able(context.gpu is not None)
    if USUAL not in able:
        yield skipped("products", "bitsandbytes is not installed")
    if not able:
        raise Skip("Triton is not installed, or its interpreter is off")
    shapes, counts = (_SHAPES, ROWS) if context.gpu else ({"small": (256, 128)}, (1, 8))
    for name, (outputs, inputs) in shapes.items():
        copies = max(1, int(_PAST_CACHE / (outputs * inputs / 2))) if context.gpu else 1
        weights = [random_weight(outputs, inputs, context.device) for _ in range(copies)]
        dense = decoded(weights[0])
        rows = []
        for count in counts:
            context.check_time()
            x = torch.randn(count, inputs, device=context.device).to(torch.bfloat16)
            here = {form: able[form] for form in (*candidates(weights[0], count), _FUSED) if form in able}
            wrong = _wrong(here, weights[0], x, linear(x, dense))
            values: dict[str, Value] = {"product": name, "rows": count}
            if context.gpu is not None:
                right = {form: product for form, product in here.items() if form not in wrong}
                values |= _times(context.gpu, right, weights, x)
            rows.append(Row("products", values, "; ".join(f"{form}: {why}" for form, why in wrong.items())))
            yield rows[-1]
        if all("chosen" in row.values for row in rows):
            yield _summary(name, rows)


def _able(gpu: bool) -> dict[str, Product]:
    """The products that can run on this machine, by name."""
    able = {OURS: PRODUCTS[OURS]}
    if find_spec("bitsandbytes") is not None:
        import_module("bitsandbytes")  # registers its operations
        able = dict(PRODUCTS)
    if find_spec("triton") is None or not (gpu or _interpreted()):
        del able[OURS]
    if USUAL in able and gpu and (kernel := _fused_kernel()) is not None:
        able[_FUSED] = lambda weight, x, bias: kernel(
            x, weight.packed, weight.shape, weight.scales, weight.blocksize, weight.quant_type, bias
        )
    return able


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _fused_kernel() -> Any:
    """bitsandbytes' private kernel for few rows; None = this version has none, and the column is left out."""
    return getattr(import_module("bitsandbytes.backends.cuda.ops"), "_gemm_4bit_kernel_impl", None)


def random_weight(outputs: int, inputs: int, device: torch.device) -> Nf4Weight:
    """A weight as the fused step stores it, with values of about inputs^-0.5."""
    packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=device)
    scales = (1 + torch.rand(outputs * inputs // _BLOCKSIZE, device=device)) * inputs**-0.5
    return Nf4Weight(packed, scales, torch.tensor(CODE, device=device), outputs, inputs, _BLOCKSIZE, "nf4")


def decoded(weight: Nf4Weight) -> Tensor:
    """The weight in bf16, [outputs, inputs]."""
    nibbles = torch.cat([weight.packed >> 4, weight.packed & 15], dim=1)
    values = weight.code[nibbles.int()].view(-1, weight.blocksize) * weight.scales[:, None]
    return values.to(torch.bfloat16).view(weight.shape)


def _wrong(forms: Mapping[str, Product], weight: Nf4Weight, x: Tensor, expected: Tensor) -> dict[str, str]:
    """The errors by form. A form without an error is left out."""
    found = {}
    for form, product in forms.items():
        try:
            got = product(weight, x, None).float()
        except Exception as error:  # compilers and drivers raise anything; go on with the other forms
            found[form] = " ".join(str(error).split())[:300]
            continue
        close = (got - expected.float()).abs() <= _EXACT * (1 + expected.abs())  # False for NaN
        if not close.all():
            found[form] = f"{int((~close).sum())} of {expected.numel()} values differ"
    return found


def _times(
    gpu: Gpu, forms: Mapping[str, Product], weights: Sequence[Nf4Weight], x: Tensor
) -> dict[str, Value]:
    """The microseconds of each form, the floor, and the form that a server would choose."""
    taken = {
        form: seconds_of([lambda w=w, p=product: p(w, x, None) for w in weights], _ROUNDS)  # type: ignore[misc]
        for form, product in forms.items()
    }
    elements = weights[0].outputs * weights[0].inputs
    work = Work(WEIGHT_BYTES["nf4, scales in float32"] * elements, 2 * len(x) * elements)
    values: dict[str, Value] = {f"{form} us": round(taken[form] * 1e6, 1) for form in taken}
    values["floor us"] = round(work.floor(gpu.machine) * 1e6, 1)
    fused = taken.pop(_FUSED, None)
    if USUAL in taken:
        values["chosen"] = quickest(taken)
    if USUAL in taken and "dense" in taken and fused is not None:
        values["bitsandbytes chooses well"] = taken[USUAL] <= _SLACK * min(fused, taken["dense"])
    return values


def _summary(name: str, rows: Sequence[Row]) -> Row:
    badly = [str(row.values["rows"]) for row in rows if not row.values.get("bitsandbytes chooses well", True)]
    choice = Choice([str(row.values["chosen"]) for row in rows])
    return Row(
        "choices",
        {"product": name, "chosen": str(choice), "bitsandbytes chooses badly at": ", ".join(badly) or "none"},
    )
