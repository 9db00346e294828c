"""The model: one forward pass over a step's flattened tokens. Everything below here is tensors.

``StockModel`` runs transformers' own blocks; ``FusedModel`` runs Llama-like ones in one native call, where
the machine can. ``build_model`` chooses, once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from adapters.base import LoadedBase
from adapters.rank_pool import RankPool
from server.engine.attention import KvShape
from server.engine.model.fused import FusedModel, why_not_fused
from server.engine.model.llama_like import differs_from
from server.engine.model.stock import StockModel
from server.engine.sequence import Chunk

log = logging.getLogger("manylora.engine")


class StepModel(Protocol):
    """Runs steps.

    Attributes:
        name: what it is, for the log.
        shapes: by layer, its keys and values.
    """

    name: str
    shapes: dict[int, KvShape]

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Take the memory for the KV pages; before the first step."""

    def __call__(
        self, chunks: Sequence[Chunk], rows: Tensor | None = None, drawn: Tensor | None = None
    ) -> Tensor:
        """Compute ``chunks`` and return float32 logits [n, vocabulary].

        Args:
            rows: int64 [n], which of the step's tokens give logits; None = the last of each sampling chunk.
            drawn: int64, on the device: what the step before drew, which nobody has read yet. A token id
                -1-i among the chunks' stands for the i-th of them.
        """


def build_model(base: LoadedBase, pool: RankPool, block_size: int, max_tokens: int) -> StepModel:
    """The fastest model that serves this base here exactly.

    Args:
        block_size: tokens of a KV block.
        max_tokens: most tokens of a step.
    """
    stock = StockModel(base, pool)
    reason = why_not_fused(stock, block_size)
    if reason is None:
        fused = FusedModel(stock, pool, max_tokens)
        reason = differs_from(fused, stock, base.model.config, block_size, max_tokens)
        if reason is None:
            fused.adopt(pool)
            return fused
    log.info("transformers' own blocks are used: %s", reason)
    return stock
