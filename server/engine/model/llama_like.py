"""What the fused models know of Llama-like models: names, activations, norms, rotary angles, and a check.

``cpu/model.py`` runs them on a CPU, ``cuda/model.py`` on a GPU. All other models run on transformers' own
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from server.engine.model.made_up import made_up_prompt
from server.engine.unsupported import Unsupported

if TYPE_CHECKING:
    from server.engine.model import StepModel

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})

ACTIVATIONS = {SiLUActivation: 0, nn.SiLU: 0, GELUTanh: 1}
"""By transformers' class, whether the activation is GELU in its tanh form."""

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on the position alone, not on the sequence's length."""

_PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_JOINED_PRODUCTS = {**_PRODUCTS, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}

_BLOCK_NORMS = {
    "norm_before_attention": "input_layernorm",
    "norm_before_mlp": "post_attention_layernorm",
}
_POST_NORMED_BLOCK = {
    "norm_before_attention": "input_layernorm",
    "norm_after_attention": "post_attention_layernorm",
    "norm_before_mlp": "pre_feedforward_layernorm",
    "norm_after_mlp": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

_POST_NORMED = frozenset({"gemma2", "gemma3_text"})
"""Model types with norms after each half of a block, too."""

_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3_text"})
"""Model types whose norms multiply by 1 + weight."""

_CHECK_TOKENS = 40
"""Length of the prompt on which two models are compared."""

ALIKE = 0.15
"""Largest ``distance`` that rounding to bf16 explains."""


def decoder_of(model: Any) -> Any:
    """The module with the embedding, the blocks and the last norm; inside a base of text and images, too."""
    return model.get_decoder()


def decoder_name(model: Any) -> str:
    """The path of ``decoder_of`` in the model."""
    decoder = decoder_of(model)
    name: str = next(name for name, module in model.named_modules() if module is decoder)
    return name


def text_config_of(model: Any) -> Any:
    """The config of ``decoder_of``."""
    return model.config.get_text_config()


def _model_type(model: Any) -> str:
    model_type: str = text_config_of(model).model_type
    return model_type


def check_llama_like(model: Any) -> Unsupported | None:
    """Why there is no fused step for this model, or None."""
    if _model_type(model) not in MODEL_TYPES:
        return Unsupported(f"there is no fused step for {_model_type(model)}")
    for kind in _rope_types(model).values():
        if kind not in STATIC_ROPE:
            return Unsupported(f"the fused step does not know rope type {kind!r}")
    activation = activation_of(model)
    if activation not in ACTIVATIONS:
        return Unsupported(f"there is no fused {activation.__name__}")
    return None


def products_of(model: Any) -> Mapping[str, Sequence[str]]:
    """A block's products, and the paths of the linears whose outputs each one has side by side."""
    return _JOINED_PRODUCTS if _model_type(model) == "phi3" else _PRODUCTS


def activation_of(model: Any) -> type[nn.Module]:
    """The class of the activation; a key of ``ACTIVATIONS`` if it is supported."""
    mlp = decoder_of(model).layers[0].mlp
    return type(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn)


def norms_of(model: Any, layer: Any) -> Mapping[str, str]:
    """The paths of a block's norms, by role."""
    block = _POST_NORMED_BLOCK if _model_type(model) in _POST_NORMED else _BLOCK_NORMS
    heads = {role: path for role, path in _HEAD_NORMS.items() if hasattr(layer.self_attn, role)}
    return {**block, **heads}


def norm_weight(model: Any, weight: Tensor) -> Tensor:
    """The weight that a fused norm multiplies by: float32, with Gemma's 1 added."""
    return (weight.float() + 1.0 if _model_type(model) in _PLUS_ONE else weight.float()).contiguous()


def rotary_angles(model: Any, positions: int, at_once: int = 8192) -> list[tuple[Tensor, Tensor]]:
    """By layer: cosines and sines, float32 [positions, rotary_size], as the model computes them.

    They include the model's scaling. Layers of one type share their tables.

    Args:
        at_once: positions computed at a time, which bounds the temporary memory.
    """
    tables = {kind: _angles(model, kind, positions, at_once) for kind in _rope_types(model)}
    if None in tables:
        return [tables[None]] * len(decoder_of(model).layers)
    return [tables[kind] for kind in text_config_of(model).layer_types]


def angle_bytes(model: Any) -> int:
    """Bytes of ``rotary_angles`` for each position."""
    return 2 * 4 * rotary_size(model) * len(_rope_types(model))


def rotary_size(model: Any) -> int:
    """The number of a head's dimensions that are rotated: the columns of ``rotary_angles``."""
    rotary: Any = decoder_of(model).rotary_emb
    (kind, *_) = _rope_types(model)
    return 2 * len(rotary.inv_freq if kind is None else getattr(rotary, f"{kind}_inv_freq"))


def _rope_types(model: Any) -> dict[str | None, str]:
    """The rope type by type of layer; by None if all layers have the same."""
    kinds = decoder_of(model).rotary_emb.rope_type
    if not isinstance(kinds, dict):
        return {None: kinds}
    return {layer_type: kinds[layer_type] for layer_type in sorted(set(text_config_of(model).layer_types))}


@torch.inference_mode()
def _angles(model: Any, layer_type: str | None, positions: int, at_once: int) -> tuple[Tensor, Tensor]:
    """Of layers of one type."""
    like = torch.zeros(1, dtype=torch.bfloat16, device=model.device)
    size = positions, rotary_size(model)
    cosines, sines = (torch.empty(size, dtype=torch.float32, device=model.device) for _ in range(2))
    rotary: Any = decoder_of(model).rotary_emb
    which = () if layer_type is None else (layer_type,)
    for start in range(0, positions, at_once):
        ids = torch.arange(start, min(start + at_once, positions), device=model.device)
        some = rotary(like, ids[None], *which)
        for table, made in zip((cosines, sines), some, strict=True):
            table[start : start + at_once] = made[0]
    return cosines, sines


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
