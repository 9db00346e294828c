"""The model: one forward pass over a step's flattened tokens. Everything below here is tensors.

Takes the transformers model as it is, with its attention routed to our pages and its linears wrapped for
adapters; ``__call__`` turns chunks into logits.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import LoadedBase
from adapters.errors import BaseModelError
from adapters.kernels import Segment, choose
from adapters.lora import attach
from adapters.rank_pool import RankPool
from server.engine.attention import AttentionBackend, LayerAttention, install
from server.engine.attention.plan import make_plan
from server.engine.attention.torch_paged import torch_paged_attention
from server.engine.sequence import Chunk


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's keys and values: heads and the dimension of each."""

    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class ModelRunner:
    """Runs steps on a loaded base.

    Args:
        base: the loaded base; its model is changed in place and belongs to the runner from now on.
        pool: the adapters' rank rows, for this base's sites.
    """

    def __init__(self, base: LoadedBase, pool: RankPool) -> None:
        self.model = base.model
        self.device = next(base.model.parameters()).device
        self.dtype: torch.dtype = base.model.dtype
        self._host = install(base.model)
        self._lora = attach(base.model, pool, choose())
        self._attention: AttentionBackend = torch_paged_attention
        self._caches: dict[int, tuple[Tensor, Tensor]] = {}
        self._block_size = 0

    @torch.inference_mode()
    def probe(self) -> dict[int, KvShape]:
        """By layer, the shape of its keys and values, learnt from a run on one token.

        Raises:
            BaseModelError: if the model cannot be served (no attention layer calls us, or it needs more).
        """
        shapes: dict[int, KvShape] = {}

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor, _: LayerAttention) -> Tensor:
            shapes[layer] = KvShape(k.shape[1], k.shape[2], v.shape[2])
            return q.new_zeros(*q.shape[:2], v.shape[2])

        self._host.handler = record
        self._forward(
            torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1).long()
        )
        if not shapes:
            raise BaseModelError(f"{type(self.model).__name__} has no attention layer that can be served.")
        return shapes

    def allocate(self, shapes: dict[int, KvShape], num_blocks: int, block_size: int) -> None:
        """Take the memory for the KV pages: per layer two tensors [blocks * block_size, kv_heads, dim]."""
        self._block_size = block_size
        slots = num_blocks * block_size
        for layer, shape in shapes.items():
            self._caches[layer] = (
                torch.zeros(slots, shape.kv_heads, shape.key_dim, dtype=self.dtype, device=self.device),
                torch.zeros(slots, shape.kv_heads, shape.value_dim, dtype=self.dtype, device=self.device),
            )

    @torch.inference_mode()
    def __call__(self, chunks: SequenceOf[Chunk]) -> Tensor:
        """Compute ``chunks`` and return float32 logits [chunks that sample, vocabulary], in their order."""
        plan = make_plan(chunks, self._block_size, self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, kind: LayerAttention) -> Tensor:
            return self._attention(q, k, v, self._caches[layer], plan, kind)

        self._host.handler = attend
        self._lora.segments = lora_segments(chunks)
        tokens, positions, last = _flatten(chunks)
        return self._forward(tokens, positions, last)

    def _forward(self, tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        out = self.model(
            input_ids=tokens[None].to(self.device),
            position_ids=positions[None].to(self.device),
            logits_to_keep=last.to(self.device),
            use_cache=False,
        )
        logits: Tensor = out.logits[0].float()
        return logits


def lora_segments(chunks: SequenceOf[Chunk]) -> list[Segment]:
    """Runs of the step's tokens that share an adapter; base tokens are in none."""
    segments: list[Segment] = []
    token = 0
    for chunk in chunks:
        slot, stop = chunk.sequence.slot, token + chunk.length
        if slot >= 0:
            if segments and segments[-1].slot == slot and segments[-1].stop == token:
                segments[-1] = Segment(slot, segments[-1].start, stop)
            else:
                segments.append(Segment(slot, token, stop))
        token = stop
    return segments


def _flatten(chunks: SequenceOf[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions of the step [tokens], and which of them give logits."""
    tokens: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    for chunk in chunks:
        stop = chunk.start + chunk.length
        tokens += chunk.sequence.tokens[chunk.start : stop]
        positions += range(chunk.start, stop)
        if chunk.samples:
            last.append(len(tokens) - 1)
    return torch.tensor(tokens), torch.tensor(positions), torch.tensor(last, dtype=torch.long)
