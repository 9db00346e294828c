"""What the next step computes. Integers only: no tensors, no clock of its own, no threads.

A step is a list of chunks under a token budget: first one token for every sequence that decodes, then
the prompts that are under way, then new sequences as seats, KV blocks and adapters allow. When blocks
run out the youngest running sequence gives its blocks back and is computed again later, so the oldest
always advances; preempted sequences come back before anything new is let in.

A step may be scheduled while the one before is in flight: launched, and its tokens not read yet. What a step
in flight may still read, blocks and adapters, is kept until it has landed.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from server.engine.kv_cache import BlockManager, BlockTable, chain_root
from server.engine.request import FinishReason
from server.engine.sequence import Chunk, Sequence
from server.engine.waiting import RoundRobinQueue, WaitingQueue


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens one step computes.
        max_model_len: tokens one sequence may reach.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class AdapterGate(Protocol):
    """Whether a sequence's adapter is on the device."""

    def admit(self, sequence: Sequence) -> bool:
        """Pin its adapter and set its slot; False = not yet. Base sequences always pass."""

    def leave(self, sequence: Sequence) -> None:
        """Undo ``admit`` when the sequence ends."""


class Scheduler:
    """Owns every sequence from ``add`` until it finishes or is removed.

    A step goes through ``schedule``, ``launched``, ``landed``, and ``advance`` for each of its chunks.

    Attributes:
        leaving: ended sequences that hold their blocks and adapter until the step in flight has landed.
        steps, preemptions, prompt_tokens, cached_tokens: counters; the last two over first admissions.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        gate: AdapterGate,
        waiting: WaitingQueue | None = None,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: WaitingQueue = waiting if waiting is not None else RoundRobinQueue()
        self.running: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # oldest first
        self.leaving: list[Sequence] = []
        self.steps = self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._gate = gate
        self._in_flight = 0  # chunks

    def __len__(self) -> int:
        return len(self.running) + len(self.preempted) + len(self.waiting)

    @property
    def num_decoding(self) -> int:
        return sum(sequence.num_pending == 1 for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, those that share an adapter side by side.

        Empty if somebody must be preempted while a step is in flight, which may read what would be taken, and
        may give back enough by itself: it has to land first.
        """
        step = _Step(self.limits.max_num_batched_tokens)
        for sequence in [s for s in self.running if s.num_pending == 1]:
            self._continue(sequence, step)
        for sequence in [s for s in self.running if s.num_pending > 1]:
            self._continue(sequence, step)
        self._resume(step)
        self._admit(step)
        self.steps += bool(step.chunks)
        return sorted(step.chunks.values(), key=lambda chunk: chunk.sequence.slot)

    def launched(self, chunks: SequenceOf[Chunk], go_on: bool) -> None:
        """Book chunks whose computation is queued.

        Args:
            go_on: schedule those that sample again before their new tokens are read, unless they surely end:
                negative ids stand for the tokens, by their place among the step's draws.
        """
        place = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.in_flight += 1
            sequence.num_computed = chunk.stop
            if chunk.samples:
                place += 1
                if go_on and not sequence.is_full(chunk.stop + 1, self.limits.max_model_len):
                    sequence.tokens.append(-place)
        self._in_flight += len(chunks)

    def landed(self, chunks: SequenceOf[Chunk]) -> None:
        """Let go of what only these launched chunks still read."""
        for chunk in chunks:
            chunk.sequence.in_flight -= 1
        self._in_flight -= len(chunks)
        for sequence in [s for s in self.leaving if not s.in_flight]:
            self.leaving.remove(sequence)
            self._release(sequence)

    def retract(self, chunk: Chunk) -> None:
        """Forget that a chunk, the latest of its sequence, was launched: it is void and will come again."""
        sequence = chunk.sequence
        if chunk.samples:
            del sequence.tokens[chunk.stop :]
        sequence.num_computed = chunk.start

    def advance(self, chunk: Chunk, token: int | None) -> FinishReason | None:
        """Book a landed chunk and, if it sampled, its new ``token``; says whether that ended it."""
        sequence, stop = chunk.sequence, chunk.stop
        assert sequence.table is not None
        self.blocks.commit(sequence.table, sequence.tokens, stop)
        if token is None:
            return None
        sequence.tokens[stop : stop + 1] = [token]  # in place of the id that stood for it, if any
        reason = sequence.finish_reason(stop + 1, self.limits.max_model_len)
        if reason is not None:
            self.remove(sequence)
        return reason

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence wherever it stands; False if it is not here any more."""
        for place in (self.running, self.preempted):
            if sequence in place:
                place.remove(sequence)
                if sequence.in_flight:
                    self.leaving.append(sequence)
                else:
                    self._release(sequence)
                return True
        return self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Assert the books (for tests)."""
        holders = [*self.running, *self.leaving]
        self.blocks.check_integrity([s.table for s in holders if s.table is not None])
        assert all(s.in_flight for s in self.leaving), "an ended sequence holds what no step reads"
        assert all(s.table is None for s in self.preempted), "a preempted sequence holds blocks"
        arrivals = [s.arrival for s in self.running]
        assert arrivals == sorted(arrivals), "running sequences are out of order"

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        length = min(sequence.num_pending, step.budget)
        if length == 0 or sequence.table is None:  # no budget left, or preempted earlier in this step
            return
        while not self.blocks.grow(sequence.table, sequence.num_computed + length):
            if self._in_flight:
                step.give_up()
                return
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return
        step.add(Chunk(sequence, sequence.num_computed, length))

    def _preempt(self, victim: Sequence, step: _Step) -> None:
        self.running.remove(victim)
        step.cancel(victim)
        self._drop_blocks(victim)
        self.preemptions += 1
        _insert_by_age(self.preempted, victim)

    def _resume(self, step: _Step) -> None:
        while self.preempted and self._has_seat(step):
            if not self._start(self.preempted[0], step):
                return
            _insert_by_age(self.running, self.preempted.pop(0))

    def _admit(self, step: _Step) -> None:
        if self.preempted:
            return
        for sequence in self.waiting.candidates():
            if not self._has_seat(step):
                return
            if not self._gate.admit(sequence):
                continue
            if not self._start(sequence, step):
                self._gate.leave(sequence)
                return
            self.waiting.admitted(sequence, step.chunks[sequence.key].length)
            _insert_by_age(self.running, sequence)

    def _has_seat(self, step: _Step) -> bool:
        return step.budget > 0 and len(self.running) < self.limits.max_num_seqs

    def _start(self, sequence: Sequence, step: _Step) -> bool:
        """Give blocks for the first chunk, if there is room for the whole sequence as it stands now."""
        table = BlockTable(chain_root(sequence.digest))
        cached = self.blocks.match(table, sequence.tokens)
        wanted = self.blocks.blocks_for(len(sequence.tokens) + 1) - len(table.blocks)
        spare = len(self.running)  # a block for each of the others to grow into, lest they be preempted
        length = min(len(sequence.tokens) - cached, step.budget)
        if wanted + spare > self.blocks.num_free and self.running:
            self.blocks.release(table)
            return False
        if not self.blocks.grow(table, cached + length):
            self.blocks.release(table)
            return False
        sequence.table, sequence.num_computed = table, cached
        if sequence.num_cached is None:
            sequence.num_cached = cached
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += cached
        step.add(Chunk(sequence, cached, length))
        return True

    def _release(self, sequence: Sequence) -> None:
        self._drop_blocks(sequence)
        self._gate.leave(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.blocks.release(sequence.table)
        sequence.table, sequence.num_computed = None, 0


class _Step:
    """The chunks gathered so far and the tokens left to give."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[tuple[str, int], Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence.key] = chunk
        self.budget -= chunk.length

    def cancel(self, sequence: Sequence) -> None:
        chunk = self.chunks.pop(sequence.key, None)
        if chunk is not None:
            self.budget += chunk.length

    def give_up(self) -> None:
        """End with nothing."""
        self.chunks.clear()
        self.budget = 0


def _insert_by_age(place: list[Sequence], sequence: Sequence) -> None:
    index = len(place)
    while index > 0 and place[index - 1].arrival > sequence.arrival:
        index -= 1
    place.insert(index, sequence)
