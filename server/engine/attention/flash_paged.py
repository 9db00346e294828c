"""Paged attention by kernels that read the pages in place, on a GPU: FlashAttention-2 and its like.

The plan (``flash_plan.py``) says where everything lies, a kernel (``flash_kernels.py``) attends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.engine.attention import KvShape, LayerAttention
from server.engine.attention.flash_plan import FlashPlan, FlashPlanner
from server.engine.sequence import Chunk


class PagedKernel(Protocol):
    """Attends over pages."""

    name: str

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: FlashPlan, kind: LayerAttention
    ) -> Tensor:
        """For each sequence of the plan, its m tokens of the step attend to its n tokens of the pages.

        The m tokens are its last ones: the mask is aligned bottom right, token i of the m sees the first
        n - m + i + 1 of the n, or as many of their last as the window has. What the tables hold beyond a
        sequence's length, and what the pages hold beyond it, is not read.

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
        max_length: tokens of the longest sequence there can be.

    Attributes:
        pages: by layer, keys and values, each [blocks + 1, block_size, kv_heads, dim]. The last block is the
            spare one, on which padding is.
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
        self._planner: FlashPlanner | None = None
        self._plan: FlashPlan | None = None

    def allocate(self, shapes: Mapping[int, KvShape], num_blocks: int) -> None:
        self.pages = {
            layer: (self._zeros(num_blocks, shape), self._zeros(num_blocks, shape))
            for layer, shape in shapes.items()
        }
        width = min(num_blocks, -(-self._max_length // self._block_size))
        self._planner = FlashPlanner(self._block_size, num_blocks, width, self._device)

    def begin(self, chunks: Sequence[Chunk], seats: int | None = None) -> None:
        assert self._planner is not None
        self._plan = self._planner.plan(chunks, seats)

    @property
    def new_slots(self) -> Tensor:
        """int64 [tokens]: block * block_size + offset of each token of the step, or of its padding."""
        return self._begun.new_slots

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values, each [tokens, kv_heads, dim], to their slots."""
        for pages, new in zip(self.pages[layer], (k, v), strict=True):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, self.new_slots, new)

    def attend(self, layer: int, q: Tensor, kind: LayerAttention) -> Tensor:
        """q [tokens, heads, dim] -> [tokens, heads, dim]; the step's keys and values are stored already."""
        return self._kernel(q, *self.pages[layer], self._begun, kind)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kind: LayerAttention) -> Tensor:
        self.store(layer, k, v)
        return self.attend(layer, q, kind)

    @property
    def _begun(self) -> FlashPlan:
        assert self._plan is not None
        return self._plan

    def _zeros(self, num_blocks: int, shape: KvShape) -> Tensor:
        size = num_blocks + 1, self._block_size, shape.kv_heads, shape.key_dim
        return torch.zeros(size, dtype=self._dtype, device=self._device)
