"""Sequences in steps, as a scheduler makes them, for tests of attention backends alone."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.attention import AttentionBackend, AttentionSpec, KvShape
from server.engine.kv_cache import BlockManager, BlockTable, chain_root
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk, Sequence

Qkv = tuple[Tensor, Tensor, Tensor]

VOCABULARY, LONGEST = 4, 96
PREEMPT = -1


@dataclass
class World:
    """Sequences on shared blocks, and the q, k and v of their tokens.

    Keys and values depend only on the token and its position, so equal prefixes have equal ones.
    """

    prompts: SequenceOf[SequenceOf[int]]
    kv_heads: int = 2
    group: int = 2
    dim: int = 8
    block_size: int = 16
    num_blocks: int = 40
    longest: int = LONGEST
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.manager = BlockManager(self.num_blocks, self.block_size)
        self.generator = torch.Generator().manual_seed(0)
        self.kv = self._random(2, VOCABULARY, self.longest, self.kv_heads, self.dim)
        params = SamplingParams(max_tokens=self.longest)
        self.sequences = [
            Sequence(str(i), 0, tuple(prompt), None, params, 0, i, frozenset())
            for i, prompt in enumerate(self.prompts)
        ]

    @property
    def shapes(self) -> dict[int, KvShape]:
        return {0: KvShape(self.kv_heads, self.dim, self.dim)}

    def step(self, lengths: SequenceOf[int]) -> list[Chunk]:
        """The chunks of a step with at most ``lengths`` tokens of each sequence; PREEMPT = preempt it."""
        chunks = []
        for sequence, length in zip(self.sequences, lengths, strict=False):
            if length == PREEMPT:
                self.preempt(sequence)
            elif length and (chunk := self._chunk(sequence, length)) is not None:
                chunks.append(chunk)
        return chunks

    def done(self, chunks: SequenceOf[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.table is not None
            sequence.num_computed += chunk.length
            self.manager.commit(sequence.table, sequence.tokens, sequence.num_computed)
            if sequence.num_pending == 0:
                sequence.tokens.append(len(sequence.tokens) % VOCABULARY)

    def preempt(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.manager.release(sequence.table)
            sequence.table, sequence.num_computed = None, 0

    def inputs(self, chunks: SequenceOf[Chunk], graph_batch_size: int | None = None) -> Qkv:
        """The q, k and v of a step. Those of padding are NaN."""
        tokens = sum(chunk.length for chunk in chunks)
        q = self._random(graph_batch_size or tokens, self.kv_heads * self.group, self.dim)
        k, v = (torch.cat([self._stored(which, chunk) for chunk in chunks]) for which in (0, 1))
        if graph_batch_size is not None:
            k, v = (
                torch.cat([x, x.new_full((graph_batch_size - tokens, *x.shape[1:]), torch.nan)])
                for x in (k, v)
            )
        return q, k, v

    def _stored(self, which: int, chunk: Chunk) -> Tensor:
        places = range(chunk.start, chunk.start + chunk.length)
        return self.kv[which, [chunk.sequence.tokens[i] for i in places], list(places)]

    def _chunk(self, sequence: Sequence, length: int) -> Chunk | None:
        if sequence.table is None:
            sequence.table = BlockTable(chain_root(None))
            sequence.num_computed = self.manager.match(sequence.table, sequence.tokens)
        length = min(length, sequence.num_pending)
        stop = sequence.num_computed + length
        fits = stop < self.longest and self.manager.grow(sequence.table, stop)
        return Chunk(sequence, sequence.num_computed, length) if fits else None

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator).to(self.device, self.dtype)


def run(
    backend: AttentionBackend,
    spec: AttentionSpec,
    chunks: SequenceOf[Chunk],
    qkv: Qkv,
    graph_batch_size: int | None = None,
) -> Tensor:
    """The backend's output for the step's tokens, without padding."""
    backend.begin(chunks, graph_batch_size)
    out = backend(0, *qkv, spec)
    return out[: sum(chunk.length for chunk in chunks)]
