"""Whether a waiting sequence's adapter is on the device: the scheduler's door to ``adapters.residency``."""

from __future__ import annotations

import time
from collections.abc import Callable

from adapters.errors import AdapterChanged, AdapterError
from adapters.registry import Registry
from adapters.residency import Residency
from server.engine.sequence import Sequence

_REBIND_EVERY = 0.25
_REBIND_TRIES = 20


class ResidencyGate:
    """Pins a sequence's adapter when it starts and unpins it when it ends.

    A sequence that has not started yet moves on to the new version of its adapter if the old one's
    content is gone from disk; one that has started keeps the version that it began with.

    Attributes:
        failures: sequences that cannot be admitted and why, for the engine to collect.
    """

    def __init__(
        self, residency: Residency, registry: Registry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures: list[tuple[Sequence, AdapterError]] = []
        self._residency = residency
        self._registry = registry
        self._clock = clock

    def admit(self, sequence: Sequence) -> bool:
        if sequence.adapter is None:
            return True
        if sequence.not_before > self._clock():
            return False
        try:
            slot = self._residency.pin(sequence.adapter)
            if slot is not None:
                sequence.slot = slot
            return slot is not None
        except AdapterChanged as error:
            self._rebind(sequence, error)
        except AdapterError as error:
            self.failures.append((sequence, error))
        return False

    def leave(self, sequence: Sequence) -> None:
        if sequence.slot >= 0 and sequence.adapter is not None:
            self._residency.unpin(sequence.adapter.digest)
        sequence.slot = -1

    def take_failures(self) -> list[tuple[Sequence, AdapterError]]:
        failures, self.failures = self.failures, []
        return failures

    def _rebind(self, sequence: Sequence, error: AdapterChanged) -> None:
        """Take the name's present version; it may be a moment until the watcher has seen it."""
        old = sequence.adapter
        assert old is not None
        try:
            new = self._registry.resolve(old.name)
        except AdapterError as gone:
            self.failures.append((sequence, gone))
            return
        if new.digest != old.digest:
            self._registry.acquire(new)
            sequence.adapter = new
            self._registry.release(old)
        sequence.attempts += 1
        sequence.not_before = self._clock() + _REBIND_EVERY
        if sequence.attempts > _REBIND_TRIES:
            self.failures.append((sequence, error))
