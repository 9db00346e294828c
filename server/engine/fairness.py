"""How lanes share what is scarce: the running places, and the prompt tokens of each step.

``Fairness`` is the interface, ``RoundRobin`` the policy. The scheduler asks it who is next, how much a lane
may take in its turn, and who gives up a place; a level above the lanes can take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from itertools import islice
from typing import Protocol

from server.engine.lanes import Lane, Lanes
from server.engine.sequence import Sequence


class Fairness(Protocol):
    """Decides between lanes. Inside a lane the oldest comes first, always."""

    def turns(self) -> Iterator[Lane]:
        """All lanes in the order in which they get prompt tokens."""

    def allowance(self, lane: Lane) -> int:
        """Prompt tokens that ``lane`` may take in this turn, at least 1."""

    def charge(self, lane: Lane, tokens: int) -> None:
        """``lane`` has been given prompt tokens, of whichever chunk of a prompt."""

    def may_take(self, lane: Lane, free: int) -> bool:
        """Whether one of the ``free`` places is for ``lane``, though others may wait too."""

    def next_in_line(self, count: int) -> list[Lane]:
        """The lanes whose head takes the next places, at most ``count``."""

    def who_gives_way(self, lane: Lane) -> Iterator[Sequence]:
        """Running sequences that may be preempted, one after another, so that ``lane``'s head can start."""

    def made_way(self, lane: Lane, victim: Sequence) -> None:
        """``victim`` was preempted for ``lane``."""

    def youngest_to_spare(self) -> Sequence:
        """The running sequence that is preempted when those that run need more blocks than there are."""


class RoundRobin:
    """Places by max-min fairness, prompt tokens by deficit round robin (Shreedhar & Varghese, 1996).

    *Prompt tokens.* The lane at the front may take ``quantum`` of them, in one step or in several, and goes
    to the back then. So lanes get equal shares, whatever the lengths of their prompts.

    *Places.* A free place goes to the lane that holds the fewest. If none is free, the lane with the most
    gives one up to a lane that waits and holds at least two fewer: the swap never has to be undone. With more
    lanes than places all hold one or none: then a place changes hands after ``slice_tokens`` generated
    tokens, a bound for the work that preempting can cost. Nobody gives way while no other lane waits.

    Args:
        lanes: turned by this policy.
        quantum: prompt tokens of a turn.
        slice_tokens: tokens that a sequence generates before it may have to give its lane's only place up.
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

    def who_gives_way(self, lane: Lane) -> Iterator[Sequence]:
        places = {other: other.num_running for other in self._lanes.holders if other is not lane}
        while places:
            richest = max(places, key=lambda other: (places[other], other.running[places[other] - 1].arrival))
            if places[richest] < lane.num_running + 2:
                break
            places[richest] -= 1
            yield richest.running[places[richest]]
        if lane.num_running == 0:
            rest = [sequence for other, count in places.items() for sequence in other.running[:count]]
            ran = [sequence for sequence in rest if sequence.num_since_start >= self._slice]
            yield from sorted(ran, key=lambda sequence: -sequence.num_since_start)

    def made_way(self, lane: Lane, victim: Sequence) -> None:
        self._lanes.to_the_back(self._lanes.of(victim))
        self._lanes.to_the_front(lane)

    def youngest_to_spare(self) -> Sequence:
        """Of the lane with the most places; so the oldest sequence of all goes last, and always advances."""
        holders = self._lanes.holders
        return max(holders, key=lambda lane: (lane.num_running, lane.running[-1].arrival)).running[-1]
