"""What all four kernels have in common: how they find an adapter, and who computes what.

The inner vector h = A x of a token is made by ``workers`` programs, in chunks of R rows; where there are
fewer chunks than workers, each chunk's sum over K is split into parts. A program's results lie in

    h[site, token, part * rank + row]      float32 [sites, tokens, width], width >= max(workers * R, rank)

and the second kernel adds the parts up, in order: no atomics, nothing to clear, the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, which):
    """values[which] of a tuple of arguments, by a number known on the device only."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(which == i, values[i], chosen)
    return chosen


@triton.jit
def pointer(cell, TYPE: tl.constexpr):
    """The address in ``cell``. Whole tensors of torch's begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(cell).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def record_of(site, slot):
    """Where ``slot``'s record is (``adapters/pool/slot_records.py``)."""
    return pointer(site + 2, tl.int64) + slot * 4


@triton.jit
def rows_of(record, j, rank):
    """int64 rows of the pool that hold the adapter's own rows ``j``; 0 beyond its rank."""
    return tl.load(pointer(record, tl.int32) + j, mask=j < rank, other=0).to(tl.int64)


@triton.jit
def parts_of(rank, workers, R: tl.constexpr):
    """Into how many parts K is split."""
    return tl.maximum(workers // tl.maximum(tl.cdiv(rank, R), 1), 1)


@triton.jit
def part_of_k(part, parts, K, BLOCK_K: tl.constexpr):
    """[start, stop) of a part; empty for the last ones where K has fewer blocks than parts."""
    size = tl.cdiv(tl.cdiv(K, parts), BLOCK_K) * BLOCK_K
    return part * size, tl.minimum(part * size + size, K)


@triton.jit
def vector(address, n, N, default):
    """An adapter's float32 vector [N] at columns ``n``; ``default`` beyond N and where it has none."""
    values = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    return tl.load(values + n, mask=n < tl.where(address == 0, 0, N), other=default)


@triton.jit
def changes_nothing(record):
    return (tl.load(record + 1) | tl.load(record + 2) | tl.load(record + 3)) == 0
