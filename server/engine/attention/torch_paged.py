"""Paged attention with torch's own kernels, for every device.

Keys and values are gathered from their pages and passed to ``scaled_dot_product_attention``. In decoding, the
query heads that share a KV head become that head's query rows, so the gathered keys are read once and not
once for each query head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.attention import AttentionSpec, KvShape
from server.engine.attention.metadata import AttentionMetadata, DecodePart, PrefillPart, build_metadata
from server.engine.sequence import Chunk

Cache = tuple[Tensor, Tensor]


class TorchPaged:
    """See ``AttentionBackend``. A layer's keys and values are each [blocks * block_size + 1, kv_heads, dim].

    The last slot is never written; padding reads it.
    """

    name = "torch SDPA over gathered pages"
    graphable = False

    def __init__(self, block_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._block_size = block_size
        self._device = device
        self._dtype = dtype
        self._caches: dict[int, Cache] = {}
        self._padding = 0
        self._metadata: AttentionMetadata | None = None

    def allocate(self, shapes: Mapping[int, KvShape], num_blocks: int) -> None:
        self._padding = num_blocks * self._block_size
        for layer, shape in shapes.items():
            self._caches[layer] = (self._pages(shape, shape.key_dim), self._pages(shape, shape.value_dim))

    def begin(self, chunks: Sequence[Chunk], graph_batch_size: int | None = None) -> None:
        assert graph_batch_size is None, "its shapes vary from step to step"
        self._metadata = build_metadata(chunks, self._block_size, self._padding, self._device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        cache, metadata = self._caches[layer], self._metadata
        assert metadata is not None
        for pages, new in zip(cache, (k, v), strict=True):
            pages.index_copy_(0, metadata.new_slots, new)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        if metadata.decode is not None:
            out[metadata.decode.tokens] = _decode(q[metadata.decode.tokens], cache, metadata.decode, spec)
        for part in metadata.prefills:
            out[part.start : part.stop] = _prefill(q[part.start : part.stop], cache, part, spec)
        return out

    def _pages(self, shape: KvShape, dim: int) -> Tensor:
        return torch.zeros(self._padding + 1, shape.kv_heads, dim, dtype=self._dtype, device=self._device)


def _decode(q: Tensor, cache: Cache, part: DecodePart, layer: AttentionSpec) -> Tensor:
    """q [n, heads, dim] -> [n, heads, dim]."""
    n, longest = part.kv_slots.shape
    keys, values = (
        pages.index_select(0, part.kv_slots.view(-1)).view(n, longest, *pages.shape[1:]).transpose(1, 2)
        for pages in cache
    )
    grouped = q.view(n, keys.shape[1], -1, q.shape[-1])
    out = _attend(grouped, keys, values, part.bias(layer.window, q.dtype), layer)
    return out.reshape(n, q.shape[1], -1)


def _prefill(q: Tensor, cache: Cache, part: PrefillPart, layer: AttentionSpec) -> Tensor:
    """q [new, heads, dim] -> [new, heads, dim]."""
    keys, values = (pages.index_select(0, part.kv_slots).transpose(0, 1)[None] for pages in cache)
    query = q.transpose(0, 1)[None]
    if part.whole and layer.window is None and layer.softcap is None:
        out = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=layer.scale, enable_gqa=True
        )
    else:
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        seen = part.seen(layer.window)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
        out = _attend(query, keys, values, bias, layer)
    return out[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, layer: AttentionSpec) -> Tensor:
    if layer.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=layer.scale)
    scores = (q @ k.transpose(-1, -2)).float() * layer.scale
    scores = layer.softcap * torch.tanh(scores / layer.softcap) + bias
    return scores.softmax(-1).to(v.dtype) @ v
