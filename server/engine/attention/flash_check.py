"""Checks on this device that a flash kernel does what its documentation says, before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.attention import AttentionSpec, KvShape
from server.engine.attention.flash_metadata import FlashMetadata
from server.engine.attention.flash_paged import PagedKernel
from server.engine.attention.reference import ReferencePaged

_GROUP = 2
_ALIKE = 0.05
"""Largest error that rounding to 16 bits explains, relative to the largest result."""


def what_is_wrong(
    kernel: PagedKernel,
    shape: KvShape,
    spec: AttentionSpec,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Compare a mixed step and a decode step with ``ReferencePaged``; None = the results agree."""

    def random(*size: int) -> Tensor:
        values = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return values.to(device, dtype)

    pages = 2, 4, block_size, shape.kv_heads, shape.key_dim
    keys, values = random(*pages)
    for counts in ([9, 1], [1, 1]):
        metadata = _metadata_of(counts, [block_size + 9, 5], device)
        q = random(sum(counts), shape.kv_heads * _GROUP, shape.key_dim)
        expected = ReferencePaged()(q, keys, values, metadata, spec).float()
        try:
            got = kernel(q, keys, values, metadata, spec).float()
        except Exception as error:  # any failure: another backend is used
            return f"it fails: {str(error).partition(chr(10))[0] or type(error).__name__}"
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        if not difference < _ALIKE:
            return f"its results are wrong by {difference:.2g}"
    return None


def _metadata_of(counts: list[int], lengths: list[int], device: torch.device) -> FlashMetadata:
    def ints(*values: int | list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    (m, _), (n, k) = counts, lengths
    return FlashMetadata(
        new_slots=torch.empty(0, dtype=torch.int64, device=device),
        query_starts=ints(0, m, sum(counts)),
        kv_starts=ints(0, n, n + k),
        lengths=ints(n, k),
        tables=ints([2, 0], [1, 3]),
        max_query=max(counts),
        max_length=max(lengths),
    )
