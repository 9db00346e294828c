"""Makes rotary embeddings independent of the requests that share a step.

transformers chooses the frequencies of LongRoPE and of dynamic NTK scaling anew in each forward pass, by the
longest sequence in it. The keys in the cache, however, keep the frequencies that they were computed with. So
the frequencies are chosen once, for the longest sequence that is served, as in vLLM. Training uses the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapters.base.context import rope_parameters
from adapters.errors import BaseModelError

_STATIC = "default"
"""A type whose frequencies transformers does not change after the module was made."""

_NEAR = 4


@torch.no_grad()
def settle_rope(model: Any, longest: int) -> bool:
    """Choose the frequencies for sequences of ``longest`` tokens; returns whether there was a choice.

    Raises:
        BaseModelError: they still depend on the step; names a length for which they do not.
    """
    changing = list(_length_dependent(model))
    for module, layer_type in changing:
        _cosines(module, layer_type, [longest - 1], model)  # transformers' own update for that length
        if layer_type is None:
            module.rope_type = _STATIC
        else:
            module.rope_type = {**module.rope_type, layer_type: _STATIC}
        alone = _cosines(module, layer_type, list(range(_NEAR)), model)
        beside = _cosines(module, layer_type, [*range(_NEAR), longest - 1], model)
        if not torch.equal(alone, beside[:, :_NEAR]):
            raise BaseModelError(
                f"for {longest} tokens, its rotary embedding depends on the longest sequence of a step. "
                f"Give {_remedy(model.config.get_text_config())}."
            )
    return bool(changing)


def _remedy(text_config: Any) -> str:
    lengths = [rope.get("original_max_position_embeddings") for rope in rope_parameters(text_config)]
    known = [length for length in lengths if length is not None]
    return f"--max-model-len {min(known)}" if known else "--base another model"


def _length_dependent(model: Any) -> Iterator[tuple[Any, str | None]]:
    """The rotary embeddings whose frequencies may change, with the type of layer if they have several."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_type = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
        for layer_type, kind in by_type:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                yield module, layer_type


def _cosines(module: Any, layer_type: str | None, positions: list[int], model: Any) -> Tensor:
    """[1, positions, …]"""
    like = torch.zeros(1, dtype=torch.float32, device=model.device)
    ids = torch.tensor([positions], device=model.device)
    made = module(like, ids) if layer_type is None else module(like, ids, layer_type)
    cosines: Tensor = made[0] if isinstance(made, tuple) else made
    return cosines.clone()
