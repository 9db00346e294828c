"""FlashAttention-2 over pages in Triton, for GPUs and models that no other build supports.

PyTorch's own build has no block tables in 2.11 and no soft cap in 2.13. All other builds need pages of 256
tokens.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.attention import AttentionSpec
from server.engine.attention.flash_metadata import FlashMetadata

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_ROWS = 64
"""Rows of a program's tile in prompts. A row is a query token and head; all heads share a KV head."""

_PROGRAMS = 512
"""This many programs keep a large GPU's memory busy: 4 on each of 128 multiprocessors."""

_MOST_SPLITS = 32
"""Most programs that share one sequence's keys. A power of two."""

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

SHAPE_FREE = ["sequences", "width", "splits"]
"""Arguments whose values Triton must not specialise on."""


class TritonPaged:
    """See ``PagedKernel``; q's last dimension must be dense.

    Decoding is bound by reading the keys and values once, which takes enough programs. If there are few
    sequences, several programs share the keys of one, and a second launch combines their results. The number
    of splits depends on the number of sequences alone, not on their lengths.
    """

    name = "FlashAttention-2 in Triton"

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        tokens, heads, dim = q.shape
        assert q.stride(2) == 1
        sequences, kv_heads = len(metadata.lengths), keys.shape[2]
        group = heads // kv_heads
        form = form_of(q.dtype, kv_heads, group, keys.shape[1], dim, spec, decode=metadata.max_query == 1)
        splits = 1
        blocks = tokens // (form["M"] // group) + sequences
        if metadata.max_query == 1:
            blocks = sequences
            splits = min(max(_PROGRAMS // (sequences * kv_heads), 1), _MOST_SPLITS)
        out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
        parts = sums = out
        if splits > 1:
            parts = torch.empty(splits, tokens, heads, dim, dtype=torch.float32, device=q.device)
            sums = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
        attend_pages[blocks, kv_heads, splits](
            parts, sums, q, keys, values, metadata.query_starts, metadata.lengths, metadata.tables,
            q.stride(0), q.stride(1), sequences, metadata.tables.stride(0), splits, spec.scale,
            spec.softcap or 1.0, SPLIT=splits > 1, **form,
        )  # fmt: skip
        if splits > 1:
            join_parts[tokens, heads](
                out, parts, sums, splits, DIM=dim, D=form["D"], MOST=_MOST_SPLITS, num_warps=4
            )
        return out


def form_of(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    page: int,
    dim: int,
    spec: AttentionSpec,
    decode: bool,
) -> dict[str, Any]:
    """The constants of ``attend_pages``."""
    padded = max(triton.next_power_of_2(dim), 16)
    rows = max(triton.next_power_of_2(group), 16)
    # Triton's interpreter would multiply bf16's bits as integers. Products of bf16 are exact in float32 too.
    dot = tl.float32 if triton.knobs.runtime.interpret else _TYPES[dtype]
    return {
        "TYPE": _TYPES[dtype],
        "DOT": dot,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "PAGE": page,
        "DIM": dim,
        "D": padded,
        "WINDOW": spec.window or 0,
        "CAPPED": spec.softcap is not None,
        "DECODE": decode,
        "M": rows if decode else max(rows, _ROWS),
        "TILE": 64 if padded <= 128 else 32,
        "num_warps": 4,
        "num_stages": 2,
    }


@triton.jit
def sequence_of(block, query_starts, sequences, TOKENS: tl.constexpr):
    """The sequence of a query block; sequence s has its first block at query_starts[s] // TOKENS + s."""
    low = block * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(query_starts + middle) // TOKENS + middle <= block
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=SHAPE_FREE)
def attend_pages(
    out, sums, q, keys, values, query_starts, lengths, tables,
    q_token, q_head, sequences, width, splits, scale, softcap,
    TYPE: tl.constexpr, DOT: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, DECODE: tl.constexpr,
    M: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over the keys j that t sees of softmax(scale * q[t, h] . k[j])[j] * v[j]

    A program computes the M / GROUP query tokens of one block, with all GROUP heads of a KV head, over one
    split of the keys that any of these tokens sees.

    Grid: (query blocks, KV heads, splits).

    Args:
        out: [tokens, heads, DIM]; with SPLIT float32 [splits, tokens, heads, DIM], the result of each split.
        sums: with SPLIT, float32 [splits, tokens, heads], the base 2 logarithm of each split's sum of
            exponentials; -inf where a split has no key, and its result is then not written.
        q: [tokens, heads, DIM], with strides ``q_token`` and ``q_head``.
        keys, values: [blocks, PAGE, KV_HEADS, DIM].
        query_starts, lengths, tables: see ``FlashMetadata``; a table's row has ``width`` blocks.
        DOT: the type of the products: TYPE, or float32 where the interpreter does not support TYPE.
        WINDOW: 0 = none.
        DECODE: every sequence has one query token.
    """
    TOKENS: tl.constexpr = M // GROUP
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = block
    if not DECODE:
        sequence = sequence_of(block, query_starts, sequences, TOKENS)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    first = 0 * block
    if not DECODE:
        first = (block - start // TOKENS - sequence) * TOKENS
    if first >= count:
        return
    before = tl.load(lengths + sequence) - count

    row, d = tl.arange(0, M), tl.arange(0, D)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    live = (row // GROUP < TOKENS) & (token < count)
    place = before + token
    where = (start + token).to(tl.int64)
    query = tl.load(
        q + where[:, None] * q_token + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    ).to(DOT)

    stop = before + tl.minimum(first + TOKENS, count)
    begin = 0 * stop
    if WINDOW:
        begin = tl.maximum(before + first - WINDOW + 1, 0) // TILE * TILE
    if SPLIT:
        size = tl.cdiv(tl.cdiv(stop - begin, TILE), splits) * TILE
        begin += split * size
        stop = tl.minimum(stop, begin + size)

    highest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, D), tl.float32)
    for tile in range(begin, stop, TILE):
        j = tile + tl.arange(0, TILE)
        known = j < stop
        page = tl.load(tables + sequence.to(tl.int64) * width + j // PAGE, mask=known, other=0)
        at = ((page.to(tl.int64) * PAGE + j % PAGE) * KV_HEADS + kv_head) * DIM
        k = tl.load(keys + at[None, :] + d[:, None], mask=known[None, :] & (d < DIM)[:, None], other=0.0)
        scores = tl.dot(query, k.to(DOT), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2_E / softcap))))
        seen = known[None, :] & (j[None, :] <= place[:, None])
        if WINDOW:
            seen &= j[None, :] > place[:, None] - WINDOW
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row may have seen no key yet
        weights = tl.exp2(scores - finite[:, None])
        kept = tl.exp2(highest - finite)
        v = tl.load(values + at[:, None] + d[None, :], mask=known[:, None] & (d < DIM)[None, :], other=0.0)
        added = tl.dot(weights.to(TYPE).to(DOT), v.to(DOT), input_precision="ieee")
        result = result * kept[:, None] + added
        total = total * kept + tl.sum(weights, 1)
        highest = higher

    heads: tl.constexpr = KV_HEADS * GROUP
    to = where * heads + head
    some = live & (total > 0.0)
    if SPLIT:
        to += split.to(tl.int64) * tl.load(query_starts + sequences) * heads
        tl.store(sums + to, tl.where(some, highest + tl.log2(total), float("-inf")), mask=live)
    result = result / tl.where(some, total, 1.0)[:, None]
    tl.store(
        out + to[:, None] * DIM + d[None, :],
        result.to(out.dtype.element_ty),
        mask=some[:, None] & (d < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def join_parts(
    out, parts, sums, splits, DIM: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """out[t, h] = sum over splits of share[split] * parts[split, t, h]; share = its part of the total sum.

    Grid: (tokens, heads). ``parts`` and ``sums`` are those of ``attend_pages``.
    """
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    apart = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    split, d = tl.arange(0, MOST), tl.arange(0, D)
    logs = tl.load(sums + split * apart + at, mask=split < splits, other=float("-inf"))
    shares = tl.exp2(logs - tl.max(logs, 0))
    shares /= tl.sum(shares, 0)
    part = tl.load(
        parts + (split * apart + at)[:, None] * DIM + d[None, :],
        mask=(logs > float("-inf"))[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    joined = tl.sum(shares[:, None] * part, 0)
    tl.store(out + at * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)
