"""How lanes share the running slots and the prompt tokens of each step.

``Fairness`` is the interface, ``RoundRobin`` the policy. The scheduler asks which lane is next, how many
tokens a lane may take in its turn, and which sequence is preempted. Another policy, for example one with a
level above the lanes, can implement the same interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from itertools import islice
from typing import Protocol

from server.engine.lanes import Lane, Lanes
from server.engine.sequence import Sequence


class Fairness(Protocol):
    """Decides between lanes. Within a lane the oldest sequence always comes first."""

    def turns(self) -> Iterator[Lane]:
        """All lanes in the order in which they get prompt tokens."""

    def allowance(self, lane: Lane) -> int:
        """Prompt tokens that ``lane`` may take in this turn, at least 1."""

    def charge(self, lane: Lane, tokens: int) -> None:
        """Record that ``lane`` was given prompt tokens."""

    def may_take(self, lane: Lane, free: int) -> bool:
        """Whether ``lane`` may take one of the ``free`` running slots, although other lanes may wait."""

    def next_in_line(self, count: int) -> list[Lane]:
        """The lanes whose head gets the next running slots, at most ``count``."""

    def preemption_order(self, lane: Lane) -> Iterator[Sequence]:
        """Running sequences that may be preempted so that ``lane``'s head can start, in this order."""

    def preempted_for(self, lane: Lane, victim: Sequence) -> None:
        """Record that ``victim`` was preempted for ``lane``."""

    def preempt_first(self) -> Sequence:
        """The sequence to preempt when the running ones need more blocks than there are."""


class RoundRobin:
    """Running slots by max-min fairness, prompt tokens by deficit round robin (Shreedhar & Varghese, 1996).

    *Prompt tokens.* The lane at the front may take ``quantum`` tokens, in one step or in several. Then it
    goes to the back. Lanes get equal shares, whatever the lengths of their prompts.

    *Running slots.* A free slot goes to the lane that holds the fewest. If no slot is free, the lane with the
    most slots gives one to a waiting lane that holds at least two fewer. Such a swap never has to be undone.
    With more lanes than slots, each lane holds one slot or none. A slot then changes lanes after
    ``slice_tokens`` generated tokens, which bounds the work that preemption can waste. No sequence is
    preempted while no other lane waits.

    Args:
        lanes: this policy orders their rotation.
        quantum: prompt tokens of a turn.
        slice_tokens: tokens that a sequence generates before it may lose its lane's only running slot.
    """

    def __init__(self, lanes: Lanes, quantum: int = 512, slice_tokens: int = 128) -> None:
        self._lanes = lanes
        self._quantum = max(quantum, 1)
        self._slice = slice_tokens

    def turns(self) -> Iterator[Lane]:
        return iter(self._lanes)

    def allowance(self, lane: Lane) -> int:
        return self._quantum - lane.spent

    def charge(self, lane: Lane, tokens: int) -> None:
        lane.spent += tokens
        if lane.spent >= self._quantum:
            lane.spent = 0
            self._lanes.to_the_back(lane)

    def may_take(self, lane: Lane, free: int) -> bool:
        if lane.num_running == 0:
            return free > 0
        level = lane.num_running
        poorer = (
            min(other.queued, level - other.num_running) for other in self._lanes if other.num_running < level
        )
        return free > sum(poorer)

    def next_in_line(self, count: int) -> list[Lane]:
        poorest = list(islice((lane for lane in self._lanes if not lane.running), count))
        if len(poorest) == count:
            return poorest
        return nsmallest(
            count, (lane for lane in self._lanes if lane.queued), key=lambda lane: lane.num_running
        )

    def preemption_order(self, lane: Lane) -> Iterator[Sequence]:
        slots = {other: other.num_running for other in self._lanes.holders if other is not lane}
        while slots:
            richest = max(slots, key=lambda other: (slots[other], other.running[slots[other] - 1].arrival))
            if slots[richest] < lane.num_running + 2:
                break
            slots[richest] -= 1
            yield richest.running[slots[richest]]
        if lane.num_running == 0:
            rest = [sequence for other, count in slots.items() for sequence in other.running[:count]]
            ran = [sequence for sequence in rest if sequence.num_since_start >= self._slice]
            yield from sorted(ran, key=lambda sequence: -sequence.num_since_start)

    def preempted_for(self, lane: Lane, victim: Sequence) -> None:
        self._lanes.to_the_back(self._lanes.of(victim))
        self._lanes.to_the_front(lane)

    def preempt_first(self) -> Sequence:
        """The youngest of the lane with the most slots, so the oldest sequence of all always advances."""
        holders = self._lanes.holders
        return max(holders, key=lambda lane: (lane.num_running, lane.running[-1].arrival)).running[-1]
