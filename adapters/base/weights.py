"""The base's weights as plain tensors, for adapters that depend on them (DoRA, biases).

It holds the modules, not the model. So it still works when they are wrapped or replaced in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters.base.panels import PANEL, unpack_panels
from adapters.base.unpack import dequantized
from adapters.sites import BaseLayout


class BaseWeights:
    """Read-only, so any thread may use it.

    Args:
        model: the causal LM, before its modules are wrapped.
        layout: the modules that may be asked for.
    """

    def __init__(self, model: Any, layout: BaseLayout) -> None:
        self._modules: dict[str, Any] = {
            name: model.get_submodule(name) for name in (*layout.sites, *layout.embedding_and_head)
        }

    def dense(self, name: str) -> Tensor:
        """[out_features, in_features] of a site, dequantised; the embedding's is [hidden, vocabulary]."""
        module = self._modules[name]
        weight: Tensor = module.weight.detach()
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return weight.t() if isinstance(module, Conv1D | torch.nn.Embedding) else weight
        if getattr(state, "packing_format_for_cpu", False):
            weight, state = _unpacked(weight, state)
        return dequantized(weight, state)

    def bias(self, name: str) -> Tensor | None:
        """[out_features], or None where the base has no bias."""
        bias: Tensor | None = getattr(self._modules[name], "bias", None)
        return None if bias is None else bias.detach()


def _unpacked(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Converts weights that bitsandbytes packed for CPUs (see ``nf4.h``) back to its usual order, with the
    same scales.

    bitsandbytes' own conversion would quantise the scales again, and the model computes with the present
    ones.
    """
    from bitsandbytes.functional import QuantState

    outputs, inputs = state.shape
    weight = unpack_panels(packed.view(outputs // PANEL, inputs // 2, PANEL)).reshape(-1, 1)
    return weight, QuantState(
        state.absmax.t().float().flatten(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=torch.bfloat16,
    )
