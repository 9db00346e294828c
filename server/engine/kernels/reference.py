"""The specification of ``BlockOps``, in torch. It is used where there is no Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def fused_add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, delta_weight: Tensor | None = None
) -> Tensor:
    if delta is not None:
        x += delta if delta_weight is None else _normed(delta.float(), delta_weight, eps).to(delta.dtype)
    return _normed(x.float(), weight, eps).to(x.dtype)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    new_slots: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    kv_heads, dim = key_pages.shape[2:]
    parts = qkv.view(len(qkv), -1, dim)
    q, k, v = torch.split(parts, [parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos[positions, None], sin[positions, None]
    q.copy_(_rotated(q.float() if q_norm is None else _normed(q.float(), q_norm, eps), cos, sin))
    k = _rotated(k.float() if k_norm is None else _normed(k.float(), k_norm, eps), cos, sin)
    key_pages.view(-1, kv_heads, dim).index_copy_(0, new_slots, k.to(key_pages.dtype))
    value_pages.view(-1, kv_heads, dim).index_copy_(0, new_slots, v)
    return q


def act_and_mul(gate_up: Tensor, gelu: bool) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    acted: Tensor = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    return (acted * up).to(gate_up.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-right, left], dim=-1) * sin, kept], dim=-1)
