"""Decides what the next step computes. Integers only: no tensors, no clock, no threads.

A step is a list of chunks under a token budget. Every decoding sequence gets one token first. The rest of the
budget goes to prompts. The lanes take turns: within a turn, running prompts continue first, then new ones
start, as far as running slots, KV blocks and adapters allow. When the blocks run out, a running sequence is
preempted: it gives its blocks back and is recomputed later. The oldest sequence always advances. ``fairness``
decides which lane is next and which sequence is preempted, ``preemption`` how many are.

A step may be scheduled while the previous one is in flight: launched, but its tokens are not read yet. The
blocks and adapters that a step in flight may still read are kept until it has completed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from server.engine.fairness import Fairness, RoundRobin
from server.engine.interface import FinishReason
from server.engine.kv_cache import BlockManager, BlockTable, chain_root
from server.engine.lanes import Lane, Lanes, insert_by_age
from server.engine.preemption import find_victims
from server.engine.sequence import Chunk, Sequence
from server.engine.step import Step

_LOOK_AHEAD = 8
"""Lanes whose next sequence has its adapter loaded before there is a running slot for it."""

_QUANTUM = 512
"""Most prompt tokens in a lane's turn. It is at most half of a step's budget, so two lanes share a step."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step.

    Attributes:
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens that one step computes.
        max_model_len: most tokens of one sequence.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class AdapterGate(Protocol):
    """Whether a sequence's adapter is on the device."""

    def prepare(self, sequence: Sequence) -> bool:
        """Start loading the sequence's adapter; returns whether ``admit`` would succeed now."""

    def admit(self, sequence: Sequence) -> bool:
        """Pin the adapter and set the sequence's slot; False = not loaded yet. The base needs no adapter."""

    def leave(self, sequence: Sequence) -> None:
        """Undo ``admit`` and ``prepare``, if they were called: the sequence has ended or does not start."""


class Scheduler:
    """Owns every sequence from ``add`` until it finishes or is removed.

    A step goes through ``schedule``, ``launched``, ``completed``, and ``advance`` for each of its chunks.

    Attributes:
        leaving: ended sequences that hold their blocks and adapter until the step in flight has completed.
        steps, preemptions, prompt_tokens, cached_tokens: counters; the last two over first admissions.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, gate: AdapterGate) -> None:
        self.limits = limits
        self.blocks = blocks
        self.lanes = Lanes()
        self.fairness: Fairness = RoundRobin(self.lanes, min(_QUANTUM, limits.max_num_batched_tokens // 2))
        self.running: list[Sequence] = []  # oldest first
        self.leaving: list[Sequence] = []
        self.steps = self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._gate = gate
        self._in_flight = 0  # chunks
        self._starved: Lane | None = None  # its head only lacks a running slot or blocks

    def __len__(self) -> int:
        return len(self.running) + self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to start or to resume; may be read from any thread."""
        return self.lanes.num_queued

    @property
    def num_decoding(self) -> int:
        return sum(sequence.num_pending == 1 for sequence in self.running)

    @property
    def _free_running_slots(self) -> int:
        return self.limits.max_num_seqs - len(self.running)

    def add(self, sequence: Sequence) -> None:
        self.lanes.push(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; chunks that share an adapter are adjacent.

        Empty if a sequence must be preempted while a step is in flight. That step may still read the blocks,
        and it may free enough of them, so it has to complete first.
        """
        if not self._preempt_for_lane():
            return []
        step = Step(self.limits.max_num_batched_tokens)
        for sequence in [s for s in self.running if s.num_pending == 1]:
            self._compute(sequence, step, 0, min(1, step.budget))
        self._share_out(step)
        self._look_ahead(step)
        self.steps += bool(step.chunks)
        return sorted(step.chunks.values(), key=lambda chunk: chunk.sequence.slot)

    def launched(self, chunks: SequenceOf[Chunk], async_scheduling: bool) -> None:
        """Book chunks whose computation has been queued.

        Args:
            async_scheduling: sequences that sample are scheduled again before their new token is read, unless
                this token is certain to be their last. The id -1-i stands for the step's i-th sample.
        """
        count = 0
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.in_flight += 1
            sequence.num_computed = chunk.stop
            if chunk.samples:
                count += 1
                if async_scheduling and not sequence.is_full(chunk.stop + 1, self.limits.max_model_len):
                    sequence.tokens.append(-count)
        self._in_flight += len(chunks)

    def completed(self, chunks: SequenceOf[Chunk]) -> None:
        """Release what only these launched chunks were still reading."""
        for chunk in chunks:
            chunk.sequence.in_flight -= 1
        self._in_flight -= len(chunks)
        for sequence in [s for s in self.leaving if not s.in_flight]:
            self.leaving.remove(sequence)
            self._release(sequence)

    def roll_back(self, chunk: Chunk) -> None:
        """Undo the launch of a sequence's latest chunk; the chunk will be scheduled again."""
        sequence = chunk.sequence
        if chunk.samples:
            del sequence.tokens[chunk.stop :]
        sequence.num_computed = chunk.start

    def advance(self, chunk: Chunk, token: int | None) -> FinishReason | None:
        """Book a completed chunk and its sampled ``token``; returns why that ended the sequence, or None."""
        sequence, stop = chunk.sequence, chunk.stop
        assert sequence.table is not None
        self.blocks.commit(sequence.table, sequence.tokens, stop)
        if token is None:
            return None
        sequence.tokens[stop : stop + 1] = [token]  # replaces the negative id that stood for it, if any
        reason = sequence.finish_reason(stop + 1, self.limits.max_model_len)
        if reason is not None:
            self.remove(sequence)
        return reason

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence in whatever state it is; False if it is no longer here."""
        if not self.lanes.remove(sequence):
            return False
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence.in_flight:
            self.leaving.append(sequence)
        else:
            self._release(sequence)
        return True

    def check_integrity(self) -> None:
        """Assert that all bookkeeping is consistent (for tests)."""
        holders = [*self.running, *self.leaving]
        self.blocks.check_integrity([s.table for s in holders if s.table is not None])
        assert all(s.in_flight for s in self.leaving), "an ended sequence holds blocks that no step reads"
        arrivals = [s.arrival for s in self.running]
        assert arrivals == sorted(arrivals), "running sequences are out of order"
        self.lanes.check_integrity(self.running)

    # -- sharing the budget -----------------------------------------------------------------------

    def _share_out(self, step: Step) -> None:
        """Give the tokens that are left to prompts; the lanes take turns."""
        for sequence in self.running:
            if sequence.num_pending > 1:
                step.prompts[self.lanes.of(sequence)].append(sequence)
        may_start = self.num_waiting > 0 and self._free_running_slots > 0
        turns = deque(
            lane for lane in self.fairness.turns() if lane in step.prompts or (may_start and lane.queued)
        )
        while turns and step.budget > 0:
            lane = turns.popleft()
            if self._turn(lane, step):
                turns.append(lane)
        self._give_unused_slots(step)

    def _turn(self, lane: Lane, step: Step) -> int:
        """One lane's turn: running prompts first, then new ones. Returns the number of tokens used."""
        left = allowance = self.fairness.allowance(lane)
        for sequence in step.prompts[lane]:
            left -= self._continue(sequence, step, left)
        while left > 0 and (length := self._admit(lane, step, left)):
            left -= length
        self.fairness.charge(lane, allowance - left)
        return allowance - left

    def _give_unused_slots(self, step: Step) -> None:
        """Give away the running slots that were kept for lanes that cannot use them yet."""
        while step.refused and step.budget > 0:
            lane = min(step.refused, key=lambda lane: lane.num_running)
            length = self._admit(lane, step, step.budget, kept=False)
            self.fairness.charge(lane, length)
            if not length:
                step.refused.remove(lane)

    def _continue(self, sequence: Sequence, step: Step, limit: int) -> int:
        """Compute at most ``limit`` more tokens of a running sequence; returns how many."""
        given = step.given(sequence)
        return self._compute(sequence, step, given, min(sequence.num_pending - given, limit, step.budget))

    def _compute(self, sequence: Sequence, step: Step, given: int, length: int) -> int:
        """Schedule ``length`` tokens beyond the ``given`` ones if there are blocks; returns how many."""
        if length <= 0 or sequence.table is None:  # nothing left, or preempted earlier in this step
            return 0
        while not self.blocks.grow(sequence.table, sequence.num_computed + given + length):
            if self._in_flight:
                step.give_up()
                return 0
            victim = self.fairness.preempt_first()
            step.cancel(victim)
            self._preempt(victim)
            if victim is sequence:
                return 0
        step.give(Chunk(sequence, sequence.num_computed, given + length), length)
        return length

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.lanes.preempt(victim)
        self._drop_blocks(victim)
        self.preemptions += 1

    # -- starting ---------------------------------------------------------------------------------

    def _admit(self, lane: Lane, step: Step, limit: int, kept: bool = True) -> int:
        """Start the lane's head with at most ``limit`` tokens; returns how many, 0 = it cannot start now.

        Args:
            kept: keep running slots for the lanes that have fewer.
        """
        head = lane.head
        if (
            head is None
            or step.budget <= 0
            or not self._free_running_slots
            or lane.num_running >= step.blocked_from
        ):
            return 0
        if kept and not self.fairness.may_take(lane, self._free_running_slots):
            step.refused.append(lane)
            return 0
        if not head.has_started and not self._gate.admit(head):
            step.not_ready.add(lane)
            return 0
        length = self._start(head, step, limit)
        if not length:
            if not head.has_started:
                self._gate.leave(head)
            step.blocked_from = lane.num_running  # free blocks are saved for it
            self._note_starved(lane)
            return 0
        self.lanes.start(head)
        insert_by_age(self.running, head)
        step.prompts[lane].append(head)
        return length

    def _start(self, sequence: Sequence, step: Step, limit: int) -> int:
        """Allocate blocks for the first chunk, if all tokens and one more block of each running one fit."""
        table = BlockTable(chain_root(sequence.digest))
        cached = self.blocks.match(table, sequence.tokens)
        length = min(len(sequence.tokens) - cached, step.budget, limit)
        missing = self.blocks.missing(table, len(sequence.tokens) + 1, spare=len(self.running))
        if (self.running and missing > 0) or not self.blocks.grow(table, cached + length):
            self.blocks.release(table)
            return 0
        sequence.table, sequence.num_computed = table, cached
        sequence.num_at_start = len(sequence.tokens)
        if sequence.num_cached is None:
            sequence.num_cached = cached
            sequence.shared.started = True
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += cached
        step.give(Chunk(sequence, cached, length), length)
        return length

    # -- preempting for a lane --------------------------------------------------------------------

    def _look_ahead(self, step: Step) -> None:
        """Load the adapters of the next lanes, and note the lane that only lacks a running slot."""
        if not self.num_waiting:
            return
        for lane in self.fairness.next_in_line(_LOOK_AHEAD):
            head = lane.head
            assert head is not None
            if lane in step.not_ready or not (head.has_started or self._gate.prepare(head)):
                continue
            if not self._free_running_slots:
                self._note_starved(lane)

    def _note_starved(self, lane: Lane) -> None:
        """Remember ``lane``, unless a lane with fewer running sequences is remembered."""
        if self._starved is None or lane.num_running < self._starved.num_running:
            self._starved = lane

    def _preempt_for_lane(self) -> bool:
        """Preempt for the lane that the last step could not serve; False = wait for the step in flight."""
        lane, self._starved = self._starved, None
        if lane is None or lane.head is None:
            return True
        candidates = self.fairness.preemption_order(lane)
        victims = find_victims(
            lane.head, candidates, self.blocks, len(self.running), self._free_running_slots
        )
        if victims and self._in_flight:
            self._starved = lane
            return False
        for victim in victims:
            self._preempt(victim)
            self.fairness.preempted_for(lane, victim)
        return True

    # -- releasing --------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        self._drop_blocks(sequence)
        self._gate.leave(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.blocks.release(sequence.table)
        sequence.table, sequence.num_computed = None, 0
