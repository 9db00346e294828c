"""Who is next: the order in which waiting sequences are offered to the scheduler.

``WaitingQueue`` is the interface; ``RoundRobinQueue`` goes round the adapters so that a flood for one
does not starve another. A weighted fair policy can take its place without the scheduler noticing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Protocol

from server.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """Sequences that have arrived and are not running."""

    def push(self, sequence: Sequence) -> None: ...

    def remove(self, sequence: Sequence) -> bool:
        """Take it out wherever it stands; False if it is not here."""

    def candidates(self) -> Iterator[Sequence]:
        """The sequences to try now, best first: at most one an adapter, so a cold one blocks no other.

        The consumer calls ``admitted`` for each one it takes, between two steps of the iterator.
        """

    def admitted(self, sequence: Sequence, cost: int) -> None:
        """``sequence`` leaves the queue to run; ``cost`` is what it is charged, in tokens."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...


class RoundRobinQueue:
    """Deficit round robin over adapters (Shreedhar & Varghese, 1996), first come first served in each.

    The adapter at the front is offered first. Once it has been charged ``quantum`` tokens it goes to the
    back, so that adapters share the prefill budget equally whatever the lengths of their prompts.
    """

    def __init__(self, quantum: int = 512) -> None:
        self._quantum = quantum
        self._lanes: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self._spent: dict[str, int] = {}

    def push(self, sequence: Sequence) -> None:
        self._lanes.setdefault(_lane(sequence), deque()).append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        lane = self._lanes.get(_lane(sequence))
        if lane is None or sequence not in lane:
            return False
        lane.remove(sequence)
        self._drop_if_empty(_lane(sequence))
        return True

    def candidates(self) -> Iterator[Sequence]:
        turn = deque(self._lanes)
        while turn:
            name = turn.popleft()
            if name not in self._lanes:
                continue
            head = self._lanes[name][0]
            yield head
            if name in self._lanes and self._lanes[name][0] is not head:  # it was admitted: the next one?
                rotated = next(reversed(self._lanes)) == name
                (turn.append if rotated else turn.appendleft)(name)

    def admitted(self, sequence: Sequence, cost: int) -> None:
        name = _lane(sequence)
        self._lanes[name].remove(sequence)
        self._spent[name] = self._spent.get(name, 0) + cost
        if self._spent[name] >= self._quantum:
            self._spent[name] -= self._quantum
            self._lanes.move_to_end(name)
        self._drop_if_empty(name)

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane

    def _drop_if_empty(self, name: str) -> None:
        if not self._lanes[name]:
            del self._lanes[name]
            self._spent.pop(name, None)


def _lane(sequence: Sequence) -> str:
    """Lanes go by adapter name, so that replacing an adapter does not earn a second turn."""
    return sequence.adapter.name if sequence.adapter else ""
