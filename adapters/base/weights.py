"""The base's own weights as plain numbers, for adapters whose meaning depends on them (DoRA, biases).

Holds the modules, not the model: it goes on working when they are wrapped or replaced in the model.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers.pytorch_utils import Conv1D

from adapters.sites import BaseLayout

_PANEL = 32
_PANELS = 32
"""How many are unpacked at a time, so that large linears take little memory for it."""


class BaseWeights:
    """Reads only, so any thread may ask.

    Args:
        model: the causal LM, its modules not yet wrapped.
        layout: what of it may be asked for.
    """

    def __init__(self, model: Any, layout: BaseLayout) -> None:
        self._modules: dict[str, Any] = {
            name: model.get_submodule(name) for name in (*layout.sites, *layout.ends)
        }

    def dense(self, name: str) -> Tensor:
        """[out_features, in_features] of a site, dequantised; the embedding's is [hidden, vocabulary]."""
        module = self._modules[name]
        weight: Tensor = module.weight.detach()
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return weight.t() if isinstance(module, Conv1D | torch.nn.Embedding) else weight
        if getattr(state, "packing_format_for_cpu", False):
            return _unpacked(weight, state)
        dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight, state)
        return dense

    def bias(self, name: str) -> Tensor | None:
        """[out_features], or None where the base has no bias."""
        bias: Tensor | None = getattr(self._modules[name], "bias", None)
        return None if bias is None else bias.detach()


def _unpacked(packed: Tensor, state: Any) -> Tensor:
    """What bitsandbytes packed for CPUs (see ``nf4.h``); it can only restore such weights approximately."""
    outputs, inputs = state.shape
    dense = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    panels = packed.view(outputs // _PANEL, inputs // 2, _PANEL)
    absmax = state.absmax.t().float().repeat_interleave(state.blocksize, dim=1)
    for first in range(0, len(panels), _PANELS):
        some = panels[first : first + _PANELS]
        pairs = torch.cat([some & 15, some >> 4], dim=-1).view(len(some), inputs // 2, _PANEL, 2)
        codes = pairs.transpose(1, 2).reshape(-1, inputs).int()
        rows = slice(first * _PANEL, first * _PANEL + len(codes))
        dense[rows] = embedding(codes, state.code.float()[:, None])[..., 0] * absmax[rows]
    return dense
