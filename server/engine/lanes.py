"""Sequences by lane: who waits, who was preempted, who runs. Integers and lists only; no policy.

A lane is an adapter's name, or the base. Lanes stand in a rotation, which ``fairness`` turns.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from server.engine.sequence import Sequence


class Lane:
    """One adapter's sequences, or the base's.

    Attributes:
        waiting: have not started; oldest first.
        preempted: have started, and gave up their place; oldest first.
        running: hold a place; oldest first.
        spent: prompt tokens charged in its present turn.
    """

    __slots__ = ("name", "preempted", "running", "spent", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: deque[Sequence] = deque()
        self.preempted: list[Sequence] = []
        self.running: list[Sequence] = []
        self.spent = 0

    @property
    def head(self) -> Sequence | None:
        """Who starts next: the preempted before the others, lest they be computed for nothing."""
        if self.preempted:
            return self.preempted[0]
        return self.waiting[0] if self.waiting else None

    @property
    def queued(self) -> int:
        return len(self.waiting) + len(self.preempted)

    @property
    def num_running(self) -> int:
        return len(self.running)


class Lanes:
    """All lanes that have sequences, in the order of the rotation: who is next comes first.

    Attributes:
        num_queued: sequences without a place; may be read from any thread.
        holders: the lanes with places, which may be few of many.
    """

    def __init__(self) -> None:
        self.num_queued = 0
        self.holders: set[Lane] = set()
        self._lanes: OrderedDict[str, Lane] = OrderedDict()

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def __len__(self) -> int:
        return len(self._lanes)

    def of(self, sequence: Sequence) -> Lane:
        """By the adapter's name, so that replacing an adapter does not earn a second turn."""
        name = sequence.adapter.name if sequence.adapter else ""
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
        return lane

    def push(self, sequence: Sequence) -> None:
        """It has arrived, and waits."""
        insert_by_age(self.of(sequence).waiting, sequence)
        self.num_queued += 1

    def start(self, sequence: Sequence) -> None:
        """The head of its lane takes a place."""
        lane = self.of(sequence)
        assert lane.head is sequence
        if lane.preempted:
            lane.preempted.pop(0)
        else:
            lane.waiting.popleft()
        self.num_queued -= 1
        insert_by_age(lane.running, sequence)
        self.holders.add(lane)

    def preempt(self, sequence: Sequence) -> None:
        """It gives up its place and waits before those that have not started."""
        lane = self.of(sequence)
        lane.running.remove(sequence)
        self._note_holder(lane)
        insert_by_age(lane.preempted, sequence)
        self.num_queued += 1

    def remove(self, sequence: Sequence) -> bool:
        """Take it out wherever it stands; False if it is not here."""
        lane = self.of(sequence)
        found = False
        for place in (lane.running, lane.preempted, lane.waiting):
            if sequence in place:
                place.remove(sequence)
                self.num_queued -= place is not lane.running
                found = True
        self._note_holder(lane)
        if not lane.queued and not lane.num_running:
            del self._lanes[lane.name]
        return found

    def to_the_front(self, lane: Lane) -> None:
        self._lanes.move_to_end(lane.name, last=False)

    def to_the_back(self, lane: Lane) -> None:
        self._lanes.move_to_end(lane.name)

    def _note_holder(self, lane: Lane) -> None:
        if not lane.running:
            self.holders.discard(lane)


def insert_by_age(place: list[Sequence] | deque[Sequence], sequence: Sequence) -> None:
    """Keep ``place`` in the order of arrival."""
    index = len(place)
    while index > 0 and place[index - 1].arrival > sequence.arrival:
        index -= 1
    place.insert(index, sequence)
