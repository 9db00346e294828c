"""Flash attention's functions in plain torch, as their documentation describes them.

They are for machines without a GPU. ``test_flash_paged.py`` also binds the calls to the real signatures.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` with a block table."""
    assert enable_gqa
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    _check_bounds(cu_seq_q, seqused_k, max_q, max_k)
    return _attend(query, key, value, cu_seq_q, seqused_k, block_table, scale, window_size, 0.0)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: Tensor,
) -> Tensor:
    lengths = cu_seqlens_k.diff()
    _check_bounds(cu_seqlens_q, lengths, max_seqlen_q, max_seqlen_k)
    window = (window_size[0], 0) if causal else window_size
    return _attend(q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, window, softcap)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    n, new = q.shape[:2]
    starts = torch.arange(0, n * new + 1, new, dtype=torch.int32)
    window = (window_size[0], 0) if causal else window_size
    out = _attend(
        q.flatten(0, 1), k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, window, softcap
    )
    return out.view(n, new, *out.shape[1:])


def _check_bounds(starts: Tensor, lengths: Tensor, max_q: int, max_k: int) -> None:
    assert int(starts.diff().max()) <= max_q
    assert int(lengths.max()) <= max_k


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    assert all(x.dtype == torch.int32 for x in (starts, lengths, tables))
    assert q.stride(-1) == keys.stride(-1) == values.stride(-1) == tables.stride(-1) == 1
    out = torch.empty_like(q)
    for (start, stop), length, table in zip(pairwise(starts.tolist()), lengths.tolist(), tables, strict=True):
        for row in range(start, stop):
            place = length - stop + row  # bottom right: the last query is at the last key
            first = 0 if window[0] < 0 else max(0, place - window[0])
            last = length - 1 if window[1] < 0 else min(length - 1, place + window[1])
            out[row] = _one(q[row], keys, values, table, range(first, last + 1), scale, softcap)
    return out


def _one(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, seen: range, scale: float, softcap: float
) -> Tensor:
    size = keys.shape[1]
    places = torch.tensor(list(seen))
    blocks = table[places // size].long()
    k, v = (
        pages[blocks, places % size].repeat_interleave(len(q) // pages.shape[2], 1)
        for pages in (keys, values)
    )
    scores = (k * q).sum(-1) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    return (scores.softmax(0)[..., None] * v).sum(0)
