"""FlashAttention-2 on a GPU for batches without padding, from the flash-attn package or from torch itself.

A batch is one row of examples, and both kernels know where each example begins. So nothing is computed
between examples, and no quadratic mask is needed.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

PACKAGE = "flash_attention_2"
"""transformers' name for the flash-attn package."""
TORCH = "manylora-varlen"
"""Our name for torch's kernel, registered with transformers."""

_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
_LEAST_CAPABILITY = (8, 0)
# Larger heads have no backward pass: in the package on all GPUs, in torch on GPUs such as the A10.
_MOST_DIM = {PACKAGE: 256, TORCH: 192}


def use_flash_attention(model: Any, capability: tuple[int, int]) -> str:
    """Make ``model`` use FlashAttention-2 if this machine has it and the model supports it.

    Args:
        capability: the GPU's compute capability.

    Returns:
        The choice and its reason, as a sentence.
    """
    package, own = _why_not_package(model, capability), _why_not_torch(model, capability)
    if package is None:
        model.set_attn_implementation(PACKAGE)
        return "Attention: FlashAttention-2 (flash-attn), example by example."
    if own is None:
        ALL_ATTENTION_FUNCTIONS.register(TORCH, varlen_attention)
        model.set_attn_implementation(TORCH)
        return "Attention: FlashAttention-2 (torch's own), example by example."
    chosen = model.config.get_text_config()._attn_implementation
    return f"Attention: transformers' {chosen} with a mask between examples, because {package}, and {own}."


def varlen_attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over ``torch.nn.attention.varlen``.

    Args:
        query: [1, heads, tokens, head_dim]; key and value: [1, kv_heads, tokens, head_dim].
        cu_seq_lens_q: int32 [examples + 1], where examples begin and the last one ends.
        max_length_q: tokens of the longest example.

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    if attention_mask is not None:
        raise ValueError("the model has a mask of its own")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    options: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in _VARLEN_OPTIONS:  # torch 2.11
        options = {}
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    window = -1 if sliding_window is None else sliding_window - 1
    bounds, longest = cu_seq_lens_q, max_length_q
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(window, 0), **options
    )
    return cast(torch.Tensor, out).unsqueeze(0), None


def _why_not_package(model: Any, capability: tuple[int, int]) -> str | None:
    """The reason why the package cannot be used; None = it can."""
    if not is_flash_attn_2_available():
        return "flash-attn is not installed"
    try:
        import flash_attn  # noqa: F401  # transformers would fail only in the first step
    except ImportError as error:  # built for another torch
        return f"flash-attn cannot be imported ({error})"
    allowed = getattr(model, "_compatible_flash_implementations", None)
    if not getattr(model, "_supports_flash_attn", False) or (allowed and PACKAGE not in allowed):
        return f"transformers' {type(model).__name__} does not support FlashAttention-2"
    return _why_not_kernel(model, capability, PACKAGE)


def _why_not_torch(model: Any, capability: tuple[int, int]) -> str | None:
    """The same for torch's kernel, which supports no softcap, no sinks and no dropout."""
    text = model.config.get_text_config()
    if "window_size" not in _VARLEN_OPTIONS:
        return f"torch {torch.__version__} has no FlashAttention-2 for rows of examples"
    if text._attn_implementation != "sdpa" or getattr(text, "attention_dropout", 0.0):
        return f"{type(model).__name__}'s attention uses features that torch's FlashAttention-2 lacks"
    if getattr(text, "v_head_dim", None) not in (None, _head_dim(text)):
        return "its keys and values have different dimensions"
    return _why_not_kernel(model, capability, TORCH)


def _why_not_kernel(model: Any, capability: tuple[int, int], name: str) -> str | None:
    dim = _head_dim(model.config.get_text_config())
    if capability < _LEAST_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"FlashAttention-2 needs compute capability 8.0, and this GPU has {has}"
    if dim % 8 or dim > _MOST_DIM[name]:
        return (
            f"FlashAttention-2 needs a head dimension that is a multiple of 8 up to {_MOST_DIM[name]}, and "
            f"this base has {dim}"
        )
    return None


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
