"""The base as transformers runs it, with our attention and our LoRA layers around its linears.

It serves every causal LM that uses transformers' attention interface, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.base import LoadedBase
from adapters.base.context import own_length
from adapters.kernels import choose as choose_lora
from adapters.layers.lora import attach
from adapters.pool.rank_pool import RankPool
from adapters.transfer import send
from server.engine.attention import AttentionBackend
from server.engine.attention.choice import choose as choose_attention
from server.engine.model.made_up import warming_steps
from server.engine.model.probe import Probe, forward, probe
from server.engine.model.steps import flatten, lora_segments
from server.engine.sequence import Chunk
from server.engine.transfer import resolve


class TransformersModel:
    """See ``StepModel``.

    Args:
        base: the loaded base. Its model is changed in place and belongs to this object from now on.
        pool: the adapters' rank rows, for this base's sites.
        found: the result of ``probe``, if it has run already.

    Attributes:
        shapes, specs: the shape of keys and values, and the attention spec, by layer.
        layout: the base's modules that adapters may change.
        lora, lora_kernel: the step's assignment of tokens to adapters, and the kernel that applies LoRA.
        attention: the backend that owns the KV pages; None before ``allocate``.
    """

    name = "transformers"
    bytes_a_position = 0

    def __init__(self, base: LoadedBase, pool: RankPool, found: Probe | None = None) -> None:
        found = found or probe(base)
        self.model = base.model
        self.device = next(base.model.parameters()).device
        self.dtype: torch.dtype = base.model.dtype
        self._host = found.host
        self.layout = base.layout
        self.lora_kernel = choose_lora(self.device, self.dtype)
        self.lora = attach(base.model, base.layout, pool, self.lora_kernel)
        self.attention: AttentionBackend | None = None
        self._sizes = 0, 0
        self.shapes, self.specs = found.shapes, found.specs
        self.fallbacks: list[str] = []

    def allocate(self, num_blocks: int, block_size: int) -> None:
        self._host.handler = self.attention = None  # free the old pages before allocating new ones
        self.attention = choose_attention(
            self.shapes,
            self.specs,
            block_size,
            self.device,
            self.dtype,
            max_length=own_length(self.model.config.get_text_config()) or num_blocks * block_size,
        )
        self.attention.allocate(self.shapes, num_blocks)
        self._sizes = num_blocks, block_size

    @property
    def attention_name(self) -> str:
        assert self.attention is not None
        return self.attention.name

    def warm_up(self) -> None:
        if self.device.type == "cuda":
            for step in warming_steps(self.model.config, *self._sizes):
                self(step)

    @torch.inference_mode()
    def __call__(
        self, chunks: SequenceOf[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor:
        assert self.attention is not None
        self.attention.begin(chunks)
        self._host.handler = self.attention
        self._host.begin()
        tokens, positions, last = flatten(chunks)
        rows = last if rows is None else rows
        self.lora.begin(len(tokens), lora_segments(chunks), rows)
        tokens, positions, rows = (send(host, self.device) for host in (tokens, positions, rows))
        return forward(self.model, resolve(tokens, prev_tokens), positions, rows)
