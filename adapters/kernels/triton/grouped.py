"""Kernels for many tokens of each adapter: tiles of one adapter's tokens, on tensor cores (a grouped
GEMM)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from adapters.kernels.triton.gather import SHAPE_FREE
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


@triton.jit(do_not_specialize=SHAPE_FREE)
def grouped_shrink(
    h, x, x_stride, tiles, sites, tokens, width, workers, K,
    TYPE: tl.constexpr, DOT: tl.constexpr, M: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[site, t, part, j] = sum over k in part of x[t, k] * A[rows[j], k], for a tile's tokens t

    Grid: (tiles, workers, sites).

    Args:
        h: see ``shared.py``.
        x: [tokens, K], its rows ``x_stride`` apart.
        tiles: int32 [n, 3], (slot or -1, start, stop) with stop - start <= M.
        sites: by site, ``SitePool.device_site``.
        TYPE: of A; x is rounded to it.
        DOT: the type of the product's inputs: TYPE, or float32 if the interpreter does not support TYPE.
    """
    tile = tiles + tl.program_id(0) * 3
    worker, number = tl.program_id(1), tl.program_id(2)
    slot, first_token, last_token = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot < 0:
        return
    site = pick(sites, number)
    record = record_of(site, slot)
    rank = tl.load(record + 1).to(tl.int32)
    a = pointer(site, TYPE)

    parts = parts_of(rank, workers, R)
    part, chunk, chunks = worker % parts, worker // parts, workers // parts
    start, stop = part_of_k(part, parts, K, BLOCK_K)
    t = first_token.to(tl.int64) + tl.arange(0, M)
    live = (t < last_token)[:, None]
    out = h + (number * tokens + t[:, None]) * width + part * rank
    for first in range(chunk * R, rank, chunks * R):
        j = first + tl.arange(0, R)
        row = rows_of(record, j, rank)
        total = tl.zeros((M, R), tl.float32)
        for begin in range(start, stop, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            values = tl.load(
                x + t[:, None] * x_stride + k[None, :], mask=live & (k < stop)[None, :], other=0.0
            )
            weights = tl.load(
                a + row[None, :] * K + k[:, None],
                mask=(j < rank)[None, :] & (k < stop)[:, None],
                other=0.0,
            )
            total = tl.dot(values.to(TYPE).to(DOT), weights.to(DOT), total, input_precision="ieee")
        tl.store(out + j[None, :], total, mask=live & (j < rank)[None, :])


@triton.jit(do_not_specialize=SHAPE_FREE)
def grouped_expand(
    ys, y_strides, outputs, h, tiles, sites, tokens, width, workers,
    TYPE: tl.constexpr, DOT: tl.constexpr, M: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t, n] = scale[n] * y[t, n] + shift[n] + sum over j of h[t, j] * B[rows[j], n]

    where h[t, j] = sum over parts of h[site, t, part, j], for a tile's tokens t.

    Grid: (tiles, blocks of the widest site's N, sites).

    Args:
        ys: by site, y [tokens, N], its rows ``y_strides[site]`` apart.
        outputs: by site, N.
        h, tiles, sites, DOT: as for ``grouped_shrink``.
        TYPE: of B; h is rounded to it.
    """
    tile = tiles + tl.program_id(0) * 3
    number = tl.program_id(2)
    slot, first_token, last_token = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
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
    t = first_token.to(tl.int64) + tl.arange(0, M)
    live = (t < last_token)[:, None]
    inner = h + (number * tokens + t[:, None]) * width
    total = tl.zeros((M, BLOCK_N), tl.float32)
    for first in range(0, rank, R):
        j = first + tl.arange(0, R)
        row = rows_of(record, j, rank)
        factor = tl.zeros((M, R), tl.float32)
        for part in range(parts_of(rank, workers, R)):
            factor += tl.load(inner + part * rank + j[None, :], mask=live & (j < rank)[None, :], other=0.0)
        weights = tl.load(
            b + row[:, None] * N + n[None, :], mask=(j < rank)[:, None] & (n < N)[None, :], other=0.0
        )
        total = tl.dot(factor.to(TYPE).to(DOT), weights.to(DOT), total, input_precision="ieee")
    scale = vector(tl.load(record + 2), n, N, 1.0)
    shift = vector(tl.load(record + 3), n, N, 0.0)
    y = pick(ys, number) + t[:, None] * pick(y_strides, number) + n[None, :]
    written = live & (n < N)[None, :]
    base = tl.load(y, mask=written, other=0.0).to(tl.float32)
    tl.store(y, (base * scale[None, :] + shift[None, :] + total).to(y.dtype.element_ty), mask=written)
