"""The model: one forward pass over a step's flattened tokens.

``TransformersModel`` runs transformers' own blocks. For Llama-like models, if the machine supports it,
``CpuModel`` runs fused blocks in one native call on a CPU, and ``CudaModel`` in few launches on a GPU.
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
from server.engine.model.cpu.model import CpuModel, check_cpu_model
from server.engine.model.llama_like import check_equal
from server.engine.model.probe import Probe
from server.engine.model.transformers_model import TransformersModel
from server.engine.sequence import Chunk
from server.engine.unsupported import Unsupported

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
        found: as for ``TransformersModel``.
    """
    unfused = TransformersModel(base, pool, found)
    if unfused.device.type == "cuda":
        fused = _build_cuda_model(unfused, pool, block_size, max_seqs, enforce_eager)
    else:
        fused = _build_cpu_model(unfused, pool, block_size, max_tokens)
    if not isinstance(fused, Unsupported):
        difference = check_equal(fused, unfused, base.model.config, block_size, max_tokens)
        if difference is None:
            if isinstance(fused, CpuModel):
                fused.adopt(pool)
            return fused
        fused = difference
    log.info("transformers' own blocks are used: %s", fused.reason)
    return unfused


def _build_cpu_model(
    unfused: TransformersModel, pool: RankPool, block_size: int, max_tokens: int
) -> StepModel | Unsupported:
    return check_cpu_model(unfused, block_size) or CpuModel(unfused, pool, max_tokens)


def _build_cuda_model(
    unfused: TransformersModel, pool: RankPool, block_size: int, max_seqs: int, enforce_eager: bool
) -> StepModel | Unsupported:
    if find_spec("triton") is None:
        return Unsupported("the fused step on a GPU needs Triton")
    from server.engine import kernels
    from server.engine.model.cuda.graphs import cuda_graphs
    from server.engine.model.cuda.model import CudaModel, check_cuda_model

    unfused.allocate(1, block_size)  # chooses the attention backend
    unsupported = check_cuda_model(unfused)
    if unsupported is not None:
        return unsupported
    new_graph = None if enforce_eager else cuda_graphs()
    return CudaModel(unfused, pool, kernels.choose(unfused.device), max_seqs, new_graph)
