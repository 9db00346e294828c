"""A fake device that runs everything as late as possible: when the host reads, in the order of the launches.

The results depend on the tokens in the sequence's pages and on the adapter in its slot, at the time of the
computation. So pages or slots that are freed too early change the tokens, as on a GPU.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from adapters.registry import Version
from server.engine.engine import Engine
from server.engine.fairness import RoundRobin
from server.engine.kv_cache import BlockManager
from server.engine.sampling.sampler import PendingSamples, Sample, sample
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Chunk, Sequence
from server.engine.transfer import resolve

VOCABULARY = 12
BLOCK = 4


class LateDevice:
    """Replaces an engine's model and sampler.

    Args:
        faults: the errors by the number of the launch, sample or read. These are counted together.
        poison: the errors by request. Every computation of such a request raises its error.
    """

    def __init__(self, num_blocks: int, faults: dict[int, Exception], poison: dict[str, Exception]) -> None:
        self.pages: list[object] = [None] * (num_blocks * BLOCK)
        self.slots: dict[int, str] = {}
        self.history: list[str] = []
        self._faults, self.poison = faults, poison
        self._count = itertools.count()
        self._queue: list[Callable[[], None]] = []

    def model(self, chunks: SequenceOf[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        self._note("launch")
        for chunk in chunks:
            if chunk.sequence.request_id in self.poison:
                raise self.poison[chunk.sequence.request_id]
        logits = torch.zeros(sum(chunk.samples for chunk in chunks), VOCABULARY)
        work = [self._work(chunk) for chunk in chunks]

        def run() -> None:
            rows = iter(logits)
            for chunk, (tokens, slots, adapter) in zip(chunks, work, strict=True):
                ids = resolve(torch.tensor(tokens[chunk.start : chunk.stop]), prev_tokens).tolist()
                for slot, token in zip(slots[chunk.start :], ids, strict=True):
                    self.pages[slot] = token
                if chunk.samples:
                    seen = (
                        self.slots[adapter] if adapter >= 0 else "",
                        *(self.pages[slot] for slot in slots),
                    )
                    next(rows).copy_(_logits(seen))

        self._queue.append(run)
        return logits

    def sample(
        self, logits: Tensor, sequences: SequenceOf[Sequence], prev_tokens: Tensor | None
    ) -> LateSamples:
        self._note("sample")
        then = [copy.copy(sequence) for sequence in sequences]
        for sequence in then:
            sequence.tokens = list(sequence.tokens)
        late = LateSamples(self, torch.zeros(len(then), dtype=torch.long))

        def run() -> None:
            late.samples = sample(logits, then, prev_tokens)
            late.tokens.copy_(late.samples.tokens)

        self._queue.append(run)
        return late

    def read(self, late: LateSamples) -> list[Sample]:
        while late.samples is None:
            self._queue.pop(0)()
        self._note("read")
        return late.samples.read()

    def _note(self, what: str) -> None:
        self.history.append(what)
        fault = self._faults.pop(next(self._count), None)
        if fault is not None:
            raise fault

    def _work(self, chunk: Chunk) -> tuple[list[int], list[int], int]:
        """The chunk's tokens, cache slots and adapter slot at the time of the launch."""
        sequence = chunk.sequence
        assert sequence.table is not None
        blocks = sequence.table.blocks
        places = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(chunk.stop)]
        return list(sequence.tokens), places, sequence.slot


class LateSamples:
    """Like ``PendingSamples``."""

    def __init__(self, device: LateDevice, tokens: Tensor) -> None:
        self._device = device
        self.tokens = tokens
        self.samples: PendingSamples | None = None

    def read(self) -> list[Sample]:
        return self._device.read(self)


class SlotGate:
    """Adapters in a few slots. A new adapter overwrites a slot without pins at once."""

    def __init__(self, device: LateDevice, num_slots: int) -> None:
        self._device = device
        self._slots: list[str | None] = [None] * num_slots
        self.pins = [0] * num_slots

    def prepare(self, sequence: Sequence) -> bool:
        return sequence.digest is None or sequence.digest in self._slots or 0 in self.pins

    def admit(self, sequence: Sequence) -> bool:
        digest = sequence.digest
        if digest is None:
            return True
        if digest not in self._slots:
            free = [slot for slot, pins in enumerate(self.pins) if pins == 0]
            if not free:
                return False
            self._slots[free[0]] = self._device.slots[free[0]] = digest
        sequence.slot = self._slots.index(digest)
        self.pins[sequence.slot] += 1
        return True

    def leave(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self.pins[sequence.slot] -= 1
        sequence.slot = -1

    def take_failures(self) -> list[Any]:
        return []


class CountingRegistry:
    """Counts the uses of adapters."""

    def __init__(self) -> None:
        self.users = 0

    def acquire(self, version: Version) -> None:
        del version
        self.users += 1

    def release(self, version: Version) -> None:
        del version
        self.users -= 1


def late_engine(
    async_scheduling: bool,
    blocks: int = 64,
    seqs: int = 4,
    budget: int = 32,
    faults: dict[int, Exception] | None = None,
    poison: dict[str, Exception] | None = None,
    slice_tokens: int = 128,
) -> tuple[Engine, LateDevice, CountingRegistry]:
    """An engine on a ``LateDevice`` with two adapter slots."""
    device = LateDevice(blocks, faults or {}, poison or {})
    gate: Any = SlotGate(device, 2)
    limits = SchedulerLimits(max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=blocks * BLOCK)
    registry: Any = CountingRegistry()
    scheduler = Scheduler(limits, BlockManager(blocks, BLOCK), gate)
    scheduler.fairness = RoundRobin(scheduler.lanes, budget // 2, slice_tokens)
    engine = Engine(device.model, scheduler, gate, registry, frozenset({2}), async_scheduling)
    engine.sample = device.sample  # type: ignore[assignment]
    return engine, device, registry


def _logits(seen: tuple[object, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seen).encode()))
    return torch.randn(VOCABULARY, generator=generator)
