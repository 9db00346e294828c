"""Sequences by lane: waiting, preempted, running. Integers and lists only; no policy.

A lane holds the sequences of one adapter name, or of the base. The lanes form a rotation, which ``fairness``
orders.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from server.engine.sequence import Sequence


class Lane:
    """One adapter's sequences, or the base's.

    Attributes:
        waiting: sequences that have not started, oldest first.
        preempted: sequences that have started and lost their running slot, oldest first.
        running: sequences that hold a running slot, oldest first.
        spent: prompt tokens charged in the current turn.
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
        """The sequence that starts next. Preempted ones come first, so that their work is not wasted."""
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
    """All lanes that have sequences, in the order of the rotation: the next lane comes first.

    Attributes:
        num_queued: sequences without a running slot; may be read from any thread.
        holders: the lanes that have running sequences.
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
        """The sequence's lane, by adapter name: a replaced adapter does not get a second turn."""
        name = sequence.adapter.name if sequence.adapter else ""
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(name)
        return lane

    def push(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        insert_by_age(self.of(sequence).waiting, sequence)
        self.num_queued += 1

    def start(self, sequence: Sequence) -> None:
        """Give a running slot to a sequence, the head of its lane."""
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
        """Take a sequence's running slot; it waits before those that have not started."""
        lane = self.of(sequence)
        lane.running.remove(sequence)
        self._note_holder(lane)
        insert_by_age(lane.preempted, sequence)
        self.num_queued += 1

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence from whichever queue it is in; False if it is in none."""
        lane = self.of(sequence)
        found = False
        for queue in (lane.running, lane.preempted, lane.waiting):
            if sequence in queue:
                queue.remove(sequence)
                self.num_queued -= queue is not lane.running
                found = True
        self._note_holder(lane)
        if not lane.queued and not lane.num_running:
            del self._lanes[lane.name]
        return found

    def to_the_front(self, lane: Lane) -> None:
        self._lanes.move_to_end(lane.name, last=False)

    def to_the_back(self, lane: Lane) -> None:
        self._lanes.move_to_end(lane.name)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Assert that the lanes agree with the ``running`` sequences, oldest first (for tests)."""
        placed = sorted((s for lane in self for s in lane.running), key=lambda s: s.arrival)
        assert placed == running, "the lanes disagree about the running sequences"
        assert all(s.table is None for lane in self for s in lane.preempted), (
            "a preempted sequence holds blocks"
        )
        assert self.num_queued == sum(lane.queued for lane in self), "num_queued is wrong"

    def _note_holder(self, lane: Lane) -> None:
        if not lane.running:
            self.holders.discard(lane)


def insert_by_age(queue: list[Sequence] | deque[Sequence], sequence: Sequence) -> None:
    """Insert into ``queue``, which is in order of arrival."""
    index = len(queue)
    while index > 0 and queue[index - 1].arrival > sequence.arrival:
        index -= 1
    queue.insert(index, sequence)
