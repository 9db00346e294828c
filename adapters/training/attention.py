"""Attention on a CPU for batches without padding, one example at a time.

A mask over the whole row would compute the blocks between examples and discard them.

y[i] = softmax(scale * q[i] . k[j]) v[j] over the positions j <= i of the same example.

For short bf16 examples torch's backward pass takes ten times as long as this one. For long examples torch's
is used, because it saves memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "manylora-packed"
_LONG = 1024
"""Tokens of an example from which its scores, [heads, tokens, tokens], take too much memory."""


def use_packed_attention(model: Any) -> None:
    """Make ``model`` use ``packed_attention`` if it uses torch's attention.

    Then it has no softcap or sinks.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)
        model.set_attn_implementation(_NAME)


def packed_attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [1, heads, tokens, head_dim]; key and value: [1, kv_heads, tokens, head_dim].
        cu_seq_lens_q: [examples + 1], where examples begin and the last one ends; None = one example.

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    if attention_mask is not None:
        raise ValueError("the model has a mask of its own")
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for begin, end in pairwise(ends):
        q, k, v = (tensor[:, :, begin:end] for tensor in (query, key, value))
        visible = _visible(end - begin, sliding_window, query.device)
        if end - begin < _LONG and not dropout:
            parts.append(_ShortAttention.apply(q, k, v, visible, scale))  # type: ignore[no-untyped-call]
        else:
            grouped = query.shape[1] != key.shape[1]
            parts.append(
                scaled_dot_product_attention(q, k, v, visible, dropout, scale=scale, enable_gqa=grouped)
            )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=256)
def _visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[length, length], True for visible positions: the latest ``window`` ones, including the token
    itself."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return visible if window is None or window >= length else visible.triu_(1 - window)


class _ShortAttention(torch.autograd.Function):
    """Attention of one example. The backward pass recomputes the weights instead of storing them.

    The query heads of a group are stacked as rows, so that one product computes the whole group.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [1, heads, length, dim]; k, v [1, kv_heads, length, dim]; visible [length, length]."""
        rows = q.reshape(1, k.shape[1], -1, q.shape[3])
        out = _weights(rows, k, visible, scale).to(v.dtype) @ v
        ctx.save_for_backward(rows, k, v, visible)
        ctx.scale = scale
        return out.view(*q.shape[:3], v.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, k, v, visible = ctx.saved_tensors
        grad_rows = grad.reshape(*rows.shape[:3], v.shape[3])
        weights = _weights(rows, k, visible, ctx.scale)
        of_weights = (grad_rows @ v.transpose(-1, -2)).float() * weights
        of_scores = (of_weights - weights * of_weights.sum(-1, keepdim=True)) * ctx.scale
        low = of_scores.to(k.dtype)
        grad_v = weights.to(grad.dtype).transpose(-1, -2) @ grad_rows
        return (low @ k).view(*grad.shape[:3], -1), low.transpose(-1, -2) @ rows, grad_v, None, None


def _weights(rows: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """[1, kv_heads, group * length, length], float32."""
    scores = (rows @ k.transpose(-1, -2)).float() * scale
    by_head = scores.view(1, k.shape[1], -1, *visible.shape).masked_fill_(~visible, -math.inf)
    return torch.softmax(by_head, -1).view(scores.shape)
