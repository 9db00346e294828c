"""The 4-bit linears of a base, and bf16 linears of exactly the numbers that they stand for."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def four_bit_linears(model: Any) -> dict[str, Any]:
    """bitsandbytes' ``Linear4bit`` modules by name; without it there are none."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@torch.no_grad()
def unpack_linears(model: Any) -> None:
    """Replace every 4-bit linear of ``model`` by a frozen ``Linear`` with its dequantised weight.

    bitsandbytes computes with that very weight, only that it unpacks it in each pass (on a CPU, at 1.1
    billion weights a second).
    """
    for name, module in four_bit_linears(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _unpacked(module))


def _unpacked(module: Any) -> torch.nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    dense = torch.nn.Linear(
        module.in_features, module.out_features, module.bias is not None, device="meta", dtype=torch.bfloat16
    )
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    dense.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if module.bias is not None:
        dense.bias = torch.nn.Parameter(module.bias.to(torch.bfloat16), requires_grad=False)
    return dense
