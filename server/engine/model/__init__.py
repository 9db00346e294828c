"""The model: one forward pass over a step's flattened tokens.

``StockModel`` runs transformers' own blocks. For Llama-like models, if the machine supports it,
``FusedModel`` runs them in one native call on a CPU, and ``DeviceModel`` in few launches on a GPU.
``build_model`` chooses once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from adapters.base import LoadedBase
from adapters.pool.rank_pool import RankPool
from server.engine.attention import KvShape
from server.engine.model.cpu.model import FusedModel, why_not_fused
from server.engine.model.llama_like import differs_from
from server.engine.model.probe import Probe
from server.engine.model.transformers_model import StockModel
from server.engine.sequence import Chunk

log = logging.getLogger("manylora.engine")


class StepModel(Protocol):
    """Runs steps.

    Attributes:
        name: for the log.
        shapes: the shape of the keys and values, by layer.
        bytes_a_position: bytes that ``allocate`` takes for each position, apart from the pages.
        fallbacks: messages about what should run here but does not, and why; filled by ``warm_up``.
    """

    name: str
    shapes: Mapping[int, KvShape]
    bytes_a_position: int
    fallbacks: list[str]

    @property
    def attention_name(self) -> str:
        """The attention backend, for the log and ``/version``; known after ``allocate``."""

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Allocate the KV pages. Call it before the first step."""

    def warm_up(self) -> None:
        """Compile kernels and capture graphs. Call it once, while no sequence owns a KV block."""

    def __call__(
        self, chunks: Sequence[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor:
        """Compute ``chunks`` and return float32 logits [n, vocabulary], valid until the next call.

        Args:
            rows: int64 [n], the tokens of the step that give logits; None = the last token of each chunk that
                samples.
            prev_tokens: int64, on the device: the tokens that the previous step sampled and the host has not
                read yet. A token id -1-i in the chunks stands for the i-th of them.
        """


def build_model(
    base: LoadedBase,
    pool: RankPool,
    block_size: int,
    max_tokens: int,
    max_seqs: int,
    enforce_eager: bool = False,
    found: Probe | None = None,
) -> StepModel:
    """The fastest model that serves this base exactly on this machine.

    Args:
        block_size: tokens of a KV block.
        max_tokens: most tokens of a step.
        max_seqs: most sequences of a step.
        enforce_eager: use no CUDA graphs.
        found: as for ``StockModel``.
    """
    stock = StockModel(base, pool, found)
    if stock.device.type == "cuda":
        fused = _on_gpu(stock, pool, block_size, max_seqs, enforce_eager)
    else:
        fused = _on_cpu(stock, pool, block_size, max_tokens)
    if isinstance(fused, str):
        reason: str | None = fused
    else:
        reason = differs_from(fused, stock, base.model.config, block_size, max_tokens)
        if reason is None:
            if isinstance(fused, FusedModel):
                fused.adopt(pool)
            return fused
    log.info("transformers' own blocks are used: %s", reason)
    return stock


def _on_cpu(stock: StockModel, pool: RankPool, block_size: int, max_tokens: int) -> StepModel | str:
    """The fused model, or why there is none."""
    return why_not_fused(stock, block_size) or FusedModel(stock, pool, max_tokens)


def _on_gpu(
    stock: StockModel, pool: RankPool, block_size: int, max_seqs: int, enforce_eager: bool
) -> StepModel | str:
    """The fused model, or why there is none."""
    if find_spec("triton") is None:
        return "the fused step on a GPU needs Triton"
    from server.engine import kernels
    from server.engine.model.cuda.graphs import cuda_graphs
    from server.engine.model.cuda.model import DeviceModel, why_not_device

    stock.allocate(1, block_size)  # chooses the attention backend
    reason = why_not_device(stock)
    if reason is not None:
        return reason
    new_graph = None if enforce_eager else cuda_graphs()
    return DeviceModel(stock, pool, kernels.choose(stock.device), max_seqs, new_graph)
