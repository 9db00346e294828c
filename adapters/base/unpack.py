"""Finds the 4-bit linears of a base, and converts them to bf16 linears with exactly the same values."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import torch

from adapters.base.experts import nf4_experts
from adapters.base.panels import PANEL
from adapters.errors import BaseModelError

logger = logging.getLogger(__name__)


def four_bit_linears(model: Any) -> dict[str, Any]:
    """bitsandbytes' ``Linear4bit`` modules by name. Without bitsandbytes there are none."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def unpack_weights(model: Any) -> None:
    """Replace every 4-bit linear of ``model`` by a frozen ``Linear`` with its dequantised weight, and NF4
    experts by transformers' own.

    bitsandbytes computes with the same weight, but unpacks it in each pass (at 1.1 billion weights a second
    on a CPU).
    """
    _unpack(model, four_bit_linears(model))
    for name, experts in nf4_experts(model).items():
        model.set_submodule(name, experts.unpacked())


def unpack_odd_linears(model: Any) -> None:
    """Does the same on a CPU for linears whose sizes bitsandbytes' CPU kernels cannot do.

    It raises where it cannot pack, and it is wrong where rows are not whole blocks (``dequantized``). Such
    linears are usually small: the gate of a shared expert has one output.
    """
    if model.device.type != "cpu":
        return
    odd = [name for name, module in four_bit_linears(model).items() if not _can_be_packed(module)]
    _unpack(model, odd)
    if odd:
        logger.info(
            "%d linears are kept in bf16: the 4-bit kernels do not support their sizes (the first is %s)",
            len(odd),
            odd[0],
        )


def check_quantized(model: Any, name: str) -> None:
    """Raises BaseModelError if 4-bit linears of ``model`` hold weights that are not in 4 bits.

    transformers joins the linears of some architectures when it saves them, and cannot split them in 4 bits.
    """
    linears = four_bit_linears(model)
    broken = [name for name, linear in linears.items() if not hasattr(linear.weight, "quant_state")]
    if broken:
        raise BaseModelError(
            f"{name} ({model.config.model_type}) cannot be loaded in 4 bits: transformers gave {len(broken)} "
            f"of its {len(linears)} linears no 4-bit weights (first: {broken[0]}). Try --quantization none, "
            "or give --base another model."
        )


def dequantized(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The dense weight, in ``state``'s shape, of 4-bit values in bitsandbytes' usual order.

    bitsandbytes 0.49 on a CPU takes the wrong scales where a block spans two rows. Therefore it gets the
    weight as one row.
    """
    from bitsandbytes.functional import dequantize_4bit  # only 4-bit bases need it

    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    dense: torch.Tensor = dequantize_4bit(weight, flat)
    return dense.view(state.shape)


def _can_be_packed(module: Any) -> bool:
    if module.in_features % module.weight.quant_state.blocksize:
        return False
    # Without AVX512-BF16 bitsandbytes does not pack.
    return bool(module.out_features % PANEL == 0 or not module.support_avx512bf16_for_cpu)


@torch.no_grad()
def _unpack(model: Any, names: Iterable[str]) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _unpacked(model.get_submodule(name)))


def _unpacked(module: Any) -> torch.nn.Linear:
    dense = torch.nn.Linear(
        module.in_features, module.out_features, module.bias is not None, device="meta", dtype=torch.bfloat16
    )
    weight = dequantized(module.weight.data, module.weight.quant_state)
    dense.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    if module.bias is not None:
        dense.bias = torch.nn.Parameter(module.bias.to(torch.bfloat16), requires_grad=False)
    return dense
