"""Code that all four kernels share: how they find an adapter, and how programs divide the work.

``workers`` programs compute the inner vector h = A x of a token, in chunks of R rows. If there are fewer
chunks than workers, each chunk's sum over K is split into parts. A program stores its results in

    h[site, token, part * rank + row]      float32 [sites, tokens, width], width >= max(workers * R, rank)

and the second kernel adds the parts in order. So there are no atomics, nothing to clear, and results are
deterministic.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, which):
    """values[which] of a tuple of arguments, where only the device knows ``which``."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(which == i, values[i], chosen)
    return chosen


@triton.jit
def pointer(cell, TYPE: tl.constexpr):
    """The address in ``cell``. torch aligns tensors to at least 16 bytes."""
    return tl.multiple_of(tl.load(cell).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def record_of(site, slot):
    """The address of ``slot``'s record (``adapters/pool/slot_records.py``)."""
    return pointer(site + 2, tl.int64) + slot * 4


@triton.jit
def rows_of(record, j, rank):
    """int64 rows of the pool for the adapter's rank rows ``j``; 0 beyond its rank."""
    return tl.load(pointer(record, tl.int32) + j, mask=j < rank, other=0).to(tl.int64)


@triton.jit
def parts_of(rank, workers, R: tl.constexpr):
    """The number of parts that K is split into."""
    return tl.maximum(workers // tl.maximum(tl.cdiv(rank, R), 1), 1)


@triton.jit
def part_of_k(part, parts, K, BLOCK_K: tl.constexpr):
    """[start, stop) of a part. If K has fewer blocks than parts, the last parts are empty."""
    size = tl.cdiv(tl.cdiv(K, parts), BLOCK_K) * BLOCK_K
    return part * size, tl.minimum(part * size + size, K)


@triton.jit
def vector(address, n, N, default):
    """An adapter's float32 vector [N] at columns ``n``; ``default`` beyond N or if there is no vector."""
    values = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    return tl.load(values + n, mask=n < tl.where(address == 0, 0, N), other=default)


@triton.jit
def changes_nothing(record):
    return (tl.load(record + 1) | tl.load(record + 2) | tl.load(record + 3)) == 0
