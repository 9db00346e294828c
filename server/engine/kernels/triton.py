"""``BlockOps`` on a GPU, in Triton. Nothing outside this file imports Triton.

A model's sizes are compile-time constants. A step's sizes and addresses are not, so one compilation serves
every step. All three kernels are bound by memory, so a thread reads 16 bytes at a time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARP = 32
_WIDE = 8
"""The number of 16-bit values in 16 bytes."""


def fused_add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, delta_weight: Tensor | None = None
) -> Tensor:
    assert x.is_contiguous()
    assert delta is None or delta.is_contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    # A row stays in registers, so it is read once, with two wide reads for each of up to 512 threads.
    warps = min(max(block // (2 * _WIDE * _WARP), 1), 16)
    _fused_add_rms_norm[len(x),](out, x, delta, weight, delta_weight, eps, x.shape[1], block, num_warps=warps)
    return out


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
    assert all(t.is_contiguous() for t in (qkv, cos, sin, key_pages, value_pages))
    kv_heads, dim = key_pages.shape[2:]
    every = qkv.shape[1] // dim
    heads = every - 2 * kv_heads
    block = triton.next_power_of_2(dim // 2)
    group = max(_ROPE_WARPS * _WARP * _WIDE // block, 1)
    _rope_and_cache[len(qkv), triton.cdiv(every, group)](
        qkv, cos, sin, positions, new_slots, key_pages, value_pages, q_norm, k_norm, eps,
        heads, kv_heads, dim, cos.shape[1], group, block, num_warps=_ROPE_WARPS,
    )  # fmt: skip
    return qkv.view(len(qkv), every, dim)[:, :heads]


_ROPE_WARPS = 4
"""Each thread reads each half of a head once, so a group is 16 heads of 128 values."""


def act_and_mul(gate_up: Tensor, gelu: bool) -> Tensor:
    assert gate_up.is_contiguous()
    tokens, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, inner)
    _act_and_mul[tokens, triton.cdiv(inner, _ACT_BLOCK)](out, gate_up, gelu, inner, _ACT_BLOCK, num_warps=4)
    return out


_ACT_BLOCK = 4 * _WARP * _WIDE


@triton.jit
def _fused_add_rms_norm(out, x, delta, weight, delta_weight, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (tokens,)."""
    i = tl.arange(0, BLOCK)
    inside = i < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + i
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        added = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if delta_weight is not None:
            scale = tl.rsqrt(tl.sum(added * added, 0) / HIDDEN + eps)
            added *= scale * tl.load(delta_weight + i, mask=inside, other=0.0)
            added = added.to(delta.dtype.element_ty).to(tl.float32)
        total = (values + added).to(x.dtype.element_ty)
        tl.store(x + at, total, mask=inside)
        values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    values *= scale * tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["positions", "new_slots"])
def _rope_and_cache(
    qkv, cos, sin, positions, new_slots, key_pages, value_pages, q_norm, k_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, groups of heads: q's, then k's, then v's).

    Each head is read in two parts of DIM / 2. They begin with the two halves of the ROTARY dimensions that
    are rotated. The other dimensions follow in both parts, and are rotated by an angle of 0.
    """
    HALF: tl.constexpr = DIM // 2
    TURNED: tl.constexpr = ROTARY // 2
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    head, i = tl.broadcast(head[:, None], tl.arange(0, BLOCK)[None, :])
    in_half = i < HALF
    is_q = in_half & (head < HEADS)
    is_k = in_half & (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = in_half & (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)

    if ROTARY == DIM:
        i_left, i_right = i, i + HALF
    else:
        i_left, i_right = tl.where(i < TURNED, i, i + TURNED), i + tl.where(i < TURNED, TURNED, HALF)

    own = qkv + t * (HEADS + 2 * KV_HEADS) * DIM + head * DIM
    left = tl.load(own + i_left, mask=is_q | is_k | is_v, other=0.0)
    right = tl.load(own + i_right, mask=is_q | is_k | is_v, other=0.0)
    slot = tl.load(new_slots + t).to(tl.int64) * KV_HEADS * DIM
    value = value_pages + slot + (head - HEADS - KV_HEADS) * DIM
    tl.store(value + i_left, left.to(value.dtype.element_ty), mask=is_v)
    tl.store(value + i_right, right.to(value.dtype.element_ty), mask=is_v)

    left, right = left.to(tl.float32), right.to(tl.float32)
    if q_norm is not None:
        scale = tl.rsqrt(tl.sum(left * left + right * right, 1) / DIM + eps)[:, None]
        left *= scale * _of_q_or_k(q_norm, k_norm, i_left, is_q, is_k)
        right *= scale * _of_q_or_k(q_norm, k_norm, i_right, is_q, is_k)
    angle, turned = tl.load(positions + t).to(tl.int64) * ROTARY + i, i < TURNED
    new_left = left * tl.load(cos + angle, mask=turned, other=1.0)
    new_left -= right * tl.load(sin + angle, mask=turned, other=0.0)
    angle += TURNED
    new_right = right * tl.load(cos + angle, mask=turned, other=1.0)
    new_right += left * tl.load(sin + angle, mask=turned, other=0.0)
    tl.store(own + i_left, new_left.to(own.dtype.element_ty), mask=is_q)
    tl.store(own + i_right, new_right.to(own.dtype.element_ty), mask=is_q)
    key = key_pages + slot + (head - HEADS) * DIM
    tl.store(key + i_left, new_left.to(key.dtype.element_ty), mask=is_k)
    tl.store(key + i_right, new_right.to(key.dtype.element_ty), mask=is_k)


@triton.jit
def _of_q_or_k(q_norm, k_norm, i, is_q, is_k):
    """The norm weights for a head of q or of k; 0 for a head of v, which has no norm."""
    return tl.load(q_norm + i, mask=is_q, other=0.0) + tl.load(k_norm + i, mask=is_k, other=0.0)


@triton.jit
def _act_and_mul(out, gate_up, GELU: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (tokens, blocks of INNER).

    GELU's tanh form is x * (1 + tanh(z)) / 2 with z = sqrt(2 / pi) * (x + 0.044715 x³). Since
    (1 + tanh(z)) / 2 = sigmoid(2 z), both activations have the form x * sigmoid(...).
    """
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + t * 2 * INNER + i, mask=i < INNER, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * INNER + INNER + i, mask=i < INNER, other=0.0).to(tl.float32)
    inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    tl.store(out + t * INNER + i, (gate * tl.sigmoid(inner) * up).to(out.dtype.element_ty), mask=i < INNER)
