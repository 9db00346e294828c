"""Attention over pages in plain torch: the reference for every ``PagedKernel``."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.attention import AttentionSpec
from server.engine.attention.flash_metadata import FlashMetadata


class ReferencePaged:
    """See ``PagedKernel``. Slow: in float32, one sequence after the other."""

    name = "reference"

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        out = torch.empty_like(q)
        starts, lengths = metadata.query_starts.tolist(), metadata.lengths.tolist()
        for table, start, stop, length in zip(metadata.tables, starts, starts[1:], lengths, strict=False):
            k, v = (_gather(pages, table, length) for pages in (keys, values))
            out[start:stop] = _attend(q[start:stop].float(), k, v, spec).to(q.dtype)
        return out


def _gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """float32 [length, kv_heads, dim]: a sequence's keys or values, in order."""
    blocks = table[: -(-length // pages.shape[1])].long()
    return pages[blocks].flatten(0, 1)[:length].float()


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """q [m, heads, dim]; k, v [n, kv_heads, dim] -> [m, heads, dim]"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    m, n = scores.shape[1:]
    age = torch.arange(n - m, n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    unseen = age < 0 if spec.window is None else (age < 0) | (age >= spec.window)
    return torch.einsum("hmn,nhd->mhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)
