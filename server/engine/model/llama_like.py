"""What the fused models know of Llama-like models: names, activations, norms, rotary angles, and a check.

``cpu/model.py`` runs them on a CPU, ``cuda/model.py`` on a GPU. All other models run on transformers' own
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from server.engine.model.made_up import made_up_prompt
from server.engine.unsupported import Unsupported

if TYPE_CHECKING:
    from server.engine.model import StepModel

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"})

ACTIVATIONS = {SiLUActivation: 0, nn.SiLU: 0, GELUTanh: 1}
"""By transformers' class, whether the activation is GELU in its tanh form."""

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
"""Largest ``distance`` that rounding to bf16 explains."""


def check_llama_like(model: Any) -> Unsupported | None:
    """Why there is no fused step for this model, or None."""
    if model.config.model_type not in MODEL_TYPES:
        return Unsupported(f"there is no fused step for {model.config.model_type}")
    if model.model.rotary_emb.rope_type not in STATIC_ROPE:
        return Unsupported(f"the fused step does not know rope type {model.model.rotary_emb.rope_type!r}")
    activation = type(model.model.layers[0].mlp.act_fn)
    if activation not in ACTIVATIONS:
        return Unsupported(f"there is no fused {activation.__name__}")
    return None


def norms_of(model: Any, layer: Any) -> Mapping[str, str]:
    """The paths of a block's norms, by role."""
    block = _GEMMA2_NORMS if model.config.model_type == "gemma2" else _BLOCK_NORMS
    heads = {role: path for role, path in _HEAD_NORMS.items() if hasattr(layer.self_attn, role)}
    return {**block, **heads}


def norm_weight(model: Any, weight: Tensor) -> Tensor:
    """The weight that a fused norm multiplies by: float32, with Gemma's 1 added."""
    return (weight.float() + 1.0 if model.config.model_type in _PLUS_ONE else weight.float()).contiguous()


@torch.inference_mode()
def rotary_angles(model: Any, positions: int, at_once: int = 8192) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, head_dim], as the model computes them, with its scaling.

    Args:
        at_once: positions computed at a time, which bounds the temporary memory.
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
    """Bytes of ``rotary_angles`` for each position."""
    return 2 * 4 * head_size(model)


def head_size(model: Any) -> int:
    """Columns of ``rotary_angles``."""
    return 2 * len(model.model.rotary_emb.inv_freq)


def check_equal(
    fused: StepModel, unfused: StepModel, config: Any, block_size: int, max_tokens: int
) -> Unsupported | None:
    """Run both models on a dummy prompt; returns how they differ, or None if they agree.

    This catches configurations that the fused steps do not know.
    """
    prompt = made_up_prompt(config, min(_CHECK_TOKENS, max_tokens), block_size)
    for model in (fused, unfused):
        model.allocate(-(-prompt.length // block_size), block_size)
    got, expected = fused([prompt]), unfused([prompt])
    difference = distance(got, expected)
    if difference < ALIKE:
        return None
    return Unsupported(f"the fused step differs from them by {difference:.2f}")


def distance(got: Tensor, expected: Tensor) -> float:
    """Root mean square difference of logits, in standard deviations of the expected ones."""
    return float((got - expected).square().mean().sqrt() / expected.std())
