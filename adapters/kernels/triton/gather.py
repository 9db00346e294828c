"""Kernels for few tokens of each adapter: one token for each program, gathered rows, no tensor cores.

Decoding is bound by reading A and B once, and by having enough running programs to do so.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from adapters.kernels.triton.shared import (
    changes_nothing,
    part_of_k,
    parts_of,
    pick,
    pointer,
    record_of,
    rows_of,
    vector,
)

SHAPE_FREE = ["tokens", "width", "workers"]
"""Arguments that Triton must not specialise by value."""


@triton.jit(do_not_specialize=SHAPE_FREE)
def gather_shrink(
    h, x, x_stride, tiles, sites, tokens, width, workers, K,
    TYPE: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[site, t, part, j] = sum over k in part of A[rows[j], k] * x[t, k]

    Grid: (tiles, workers, sites).

    Args:
        h: see ``shared.py``.
        x: [tokens, K], its rows ``x_stride`` apart.
        tiles: int32 [n, 3], (slot or -1, t, t + 1).
        sites: by site, ``SitePool.device_site``.
        TYPE: of A.
    """
    tile = tiles + tl.program_id(0) * 3
    worker, number = tl.program_id(1), tl.program_id(2)
    slot, t = tl.load(tile), tl.load(tile + 1).to(tl.int64)
    if slot < 0:
        return
    site = pick(sites, number)
    record = record_of(site, slot)
    rank = tl.load(record + 1).to(tl.int32)
    a = pointer(site, TYPE)

    parts = parts_of(rank, workers, R)
    part, chunk, chunks = worker % parts, worker // parts, workers // parts
    start, stop = part_of_k(part, parts, K, BLOCK_K)
    out = h + (number * tokens + t) * width + part * rank
    for first in range(chunk * R, rank, chunks * R):
        j = first + tl.arange(0, R)
        row = rows_of(record, j, rank)
        total = tl.zeros((R, BLOCK_K), tl.float32)
        for begin in range(start, stop, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            values = tl.load(x + t * x_stride + k, mask=k < stop, other=0.0)
            weights = tl.load(
                a + row[:, None] * K + k[None, :],
                mask=(j < rank)[:, None] & (k < stop)[None, :],
                other=0.0,
            )
            total += weights.to(tl.float32) * values.to(tl.float32)[None, :]
        tl.store(out + j, tl.sum(total, 1), mask=j < rank)


@triton.jit(do_not_specialize=SHAPE_FREE)
def gather_expand(
    ys, y_strides, outputs, h, tiles, sites, tokens, width, workers,
    TYPE: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y[t, n] = scale[n] * y[t, n] + shift[n] + sum over j of h[t, j] * B[rows[j], n]

    where h[t, j] = sum over parts of h[site, t, part, j].

    Grid: (tiles, blocks of the widest site's N, sites).

    Args:
        ys: by site, y [tokens, N], its rows ``y_strides[site]`` apart.
        outputs: by site, N.
        h, tiles, sites: as for ``gather_shrink``.
        TYPE: of B.
        PARTS: ``workers``, a power of two.
    """
    tile = tiles + tl.program_id(0) * 3
    number = tl.program_id(2)
    slot, t = tl.load(tile), tl.load(tile + 1).to(tl.int64)
    N = pick(outputs, number)
    if (slot < 0) | (tl.program_id(1) * BLOCK_N >= N):
        return
    site = pick(sites, number)
    record = record_of(site, slot)
    if changes_nothing(record):
        return
    rank = tl.load(record + 1).to(tl.int32)
    b = pointer(site + 1, TYPE)

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = pick(ys, number) + t * pick(y_strides, number) + n
    scale = vector(tl.load(record + 2), n, N, 1.0)
    shift = vector(tl.load(record + 3), n, N, 0.0)
    total = tl.load(y, mask=n < N, other=0.0).to(tl.float32) * scale + shift
    part = tl.arange(0, PARTS)
    inner = h + (number * tokens + t) * width + part[:, None] * rank
    given = (part < parts_of(rank, workers, R))[:, None]
    for first in range(0, rank, R):
        j = first + tl.arange(0, R)
        row = rows_of(record, j, rank)
        factor = tl.sum(tl.load(inner + j[None, :], mask=given & (j < rank)[None, :], other=0.0), 0)
        weights = tl.load(
            b + row[:, None] * N + n[None, :], mask=(j < rank)[:, None] & (n < N)[None, :], other=0.0
        )
        total += tl.sum(factor[:, None] * weights.to(tl.float32), 0)
    tl.store(y, total.to(y.dtype.element_ty), mask=n < N)
