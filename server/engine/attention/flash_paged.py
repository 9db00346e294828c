"""Paged attention on a GPU by kernels that read the pages in place, such as FlashAttention-2.

The metadata (``flash_metadata.py``) describes the step; a kernel (``flash_kernels.py``) attends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.engine.attention import AttentionSpec, KvShape
from server.engine.attention.flash_metadata import FlashMetadata, FlashMetadataBuilder
from server.engine.sequence import Chunk


class PagedKernel(Protocol):
    """Attends over pages."""

    name: str

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        """The m tokens of each sequence in the step attend to the n tokens of the sequence in the pages.

        The m tokens are the sequence's last ones, so the mask is aligned bottom right: token i of the m sees
        the first n - m + i + 1 of the n tokens, or the last ones of these if there is a window. Tables and
        pages are not read beyond a sequence's length.

        Args:
            q: [tokens, heads, dim].
            keys, values: [blocks, block_size, kv_heads, dim]; the kv head of head h is
                h * kv_heads // heads.

        Returns:
            [tokens, heads, dim].
        """


class FlashPaged:
    """See ``AttentionBackend``.

    Args:
        max_length: tokens of the longest possible sequence.

    Attributes:
        pages: by layer, keys and values, each [blocks + 1, block_size, kv_heads, dim]. The last block is
            the spare one, which padding uses.
    """

    graphable = True

    def __init__(
        self, kernel: PagedKernel, block_size: int, device: torch.device, dtype: torch.dtype, max_length: int
    ) -> None:
        self.name = kernel.name
        self.pages: dict[int, tuple[Tensor, Tensor]] = {}
        self._kernel = kernel
        self._block_size = block_size
        self._device = device
        self._dtype = dtype
        self._max_length = max_length
        self._builder: FlashMetadataBuilder | None = None
        self._metadata: FlashMetadata | None = None

    def allocate(self, shapes: Mapping[int, KvShape], num_blocks: int) -> None:
        self.pages = {
            layer: (self._zeros(num_blocks, shape), self._zeros(num_blocks, shape))
            for layer, shape in shapes.items()
        }
        width = min(num_blocks, -(-self._max_length // self._block_size))
        self._builder = FlashMetadataBuilder(self._block_size, num_blocks, width, self._device)

    def begin(self, chunks: Sequence[Chunk], graph_batch_size: int | None = None) -> None:
        assert self._builder is not None
        self._metadata = self._builder.build(chunks, graph_batch_size)

    @property
    def new_slots(self) -> Tensor:
        """int64 [tokens]: block * block_size + offset of each token of the step, with padding."""
        return self._begun.new_slots

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values, each [tokens, kv_heads, dim], to their slots."""
        for pages, new in zip(self.pages[layer], (k, v), strict=True):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self.new_slots, new)

    def attend(self, layer: int, q: Tensor, spec: AttentionSpec) -> Tensor:
        """q [tokens, heads, dim] -> [tokens, heads, dim]. The step's keys and values must be stored."""
        return self._kernel(q, *self.pages[layer], self._begun, spec)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self.store(layer, k, v)
        return self.attend(layer, q, spec)

    @property
    def _begun(self) -> FlashMetadata:
        assert self._metadata is not None
        return self._metadata

    def _zeros(self, num_blocks: int, shape: KvShape) -> Tensor:
        size = num_blocks + 1, self._block_size, shape.kv_heads, shape.key_dim
        return torch.zeros(size, dtype=self._dtype, device=self._device)
