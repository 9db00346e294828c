"""Finds the 4-bit linears of a base, and converts them to bf16 linears with exactly the same values."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import torch

logger = logging.getLogger(__name__)

PANEL = 32
"""Outputs of one block in bitsandbytes' 4-bit CPU kernels."""


def four_bit_linears(model: Any) -> dict[str, Any]:
    """bitsandbytes' ``Linear4bit`` modules by name. Without bitsandbytes there are none."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def unpack_linears(model: Any) -> None:
    """Replace every 4-bit linear of ``model`` by a frozen ``Linear`` with its dequantised weight.

    bitsandbytes computes with the same weight, but unpacks it in each pass (at 1.1 billion weights a second
    on a CPU).
    """
    _unpack(model, four_bit_linears(model))


def unpack_odd_linears(model: Any) -> None:
    """Does the same on a CPU for linears whose sizes bitsandbytes' CPU kernel cannot pack; it raises for
    them.

    They are usually small: the gate of a shared expert has one output.
    """
    if model.device.type != "cpu":
        return
    odd = [name for name, module in four_bit_linears(model).items() if not _can_be_packed(module)]
    _unpack(model, odd)
    if odd:
        logger.info(
            "%d linears, the first is %s, are kept in bf16: 4-bit kernels lack their sizes", len(odd), odd[0]
        )


def _can_be_packed(module: Any) -> bool:
    if not module.support_avx512bf16_for_cpu:  # bitsandbytes does not try it then
        return True
    whole_blocks = module.in_features % module.weight.quant_state.blocksize == 0
    return bool(module.out_features % PANEL == 0 and whole_blocks)


@torch.no_grad()
def _unpack(model: Any, names: Iterable[str]) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _unpacked(model.get_submodule(name)))


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
