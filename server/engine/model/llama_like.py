"""What the fused models must know of Llama-like ones: names, activations, norms, rotary angles; a guard.

``fused.py`` runs them on a CPU, ``device.py`` on a GPU. Whatever is not known here runs on transformers' own
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from server.engine.model.made_up import made_up_prompt

if TYPE_CHECKING:
    from server.engine.model import StepModel

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"})

ACTIVATIONS = {SiLUActivation: 0, nn.SiLU: 0, GELUTanh: 1}
"""Whether it is GELU's tanh form, by transformers' own."""

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone, not on the sequence's length."""

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

_BLOCK_NORMS = {
    "norm_before_attention": "input_layernorm",
    "norm_before_mlp": "post_attention_layernorm",
}
_GEMMA2_NORMS = {
    "norm_before_attention": "input_layernorm",
    "norm_after_attention": "post_attention_layernorm",
    "norm_before_mlp": "pre_feedforward_layernorm",
    "norm_after_mlp": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

_PLUS_ONE = frozenset({"gemma", "gemma2"})
"""Model types whose norms multiply by 1 + weight."""

_CHECK_TOKENS = 40
"""Length of the prompt on which two models are compared."""

ALIKE = 0.15
"""``distance`` that bf16's rounding explains."""


def why_unlike_llama(model: Any) -> str | None:
    """Why no fused step knows this model, or None."""
    if model.config.model_type not in MODEL_TYPES:
        return f"there is no fused step for {model.config.model_type}"
    if model.model.rotary_emb.rope_type not in STATIC_ROPE:
        return f"rope type {model.model.rotary_emb.rope_type!r} depends on the length"
    activation = type(model.model.layers[0].mlp.act_fn)
    if activation not in ACTIVATIONS:
        return f"there is no fused {activation.__name__}"
    return None


def norms_of(model: Any, layer: Any) -> Mapping[str, str]:
    """Where a block's norms are, by what they are for."""
    block = _GEMMA2_NORMS if model.config.model_type == "gemma2" else _BLOCK_NORMS
    heads = {role: path for role, path in _HEAD_NORMS.items() if hasattr(layer.self_attn, role)}
    return {**block, **heads}


def norm_weight(model: Any, weight: Tensor) -> Tensor:
    """What a fused norm multiplies by: float32."""
    return (weight.float() + 1.0 if model.config.model_type in _PLUS_ONE else weight.float()).contiguous()


@torch.inference_mode()
def rotary_angles(model: Any, positions: int, at_once: int = 8192) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, head_dim] as the model makes them, its scaling included.

    Args:
        at_once: positions computed together: what that takes besides the tables does not grow with them.
    """
    like = torch.zeros(1, dtype=torch.bfloat16, device=model.device)
    size = positions, head_size(model)
    cosines, sines = (torch.empty(size, dtype=torch.float32, device=model.device) for _ in range(2))
    for start in range(0, positions, at_once):
        ids = torch.arange(start, min(start + at_once, positions), device=model.device)
        some = model.model.rotary_emb(like, ids[None])
        for table, made in zip((cosines, sines), some, strict=True):
            table[start : start + at_once] = made[0]
    return cosines, sines


def angle_bytes(model: Any) -> int:
    """What ``rotary_angles`` keeps for each position."""
    return 2 * 4 * head_size(model)


def head_size(model: Any) -> int:
    """Columns of ``rotary_angles``."""
    return 2 * len(model.model.rotary_emb.inv_freq)


def differs_from(
    ours: StepModel, stock: StepModel, config: Any, block_size: int, max_tokens: int
) -> str | None:
    """Run both on a made-up prompt; says so if ours is not the model that transformers would run.

    A guard against configurations that the fused steps do not know of.
    """
    prompt = made_up_prompt(config, min(_CHECK_TOKENS, max_tokens), block_size)
    for model in (ours, stock):
        model.allocate(-(-prompt.length // block_size), block_size)
    got, expected = ours([prompt]), stock([prompt])
    difference = distance(got, expected)
    return None if difference < ALIKE else f"the fused step differs from them by {difference:.2f}"


def distance(got: Tensor, expected: Tensor) -> float:
    """Of logits: the mean one, in standard deviations of the expected ones."""
    return float((got - expected).square().mean().sqrt() / expected.std())
