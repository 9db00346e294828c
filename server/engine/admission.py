"""Whether a waiting sequence's adapter is on the device: the scheduler's view of ``adapters.residency``."""

from __future__ import annotations

import time
from collections.abc import Callable

from adapters.errors import AdapterChanged, AdapterError
from adapters.registry import Registry
from adapters.residency import Residency
from server.engine.sequence import Sequence, Shared

_REBIND_EVERY = 0.25
_REBIND_TRIES = 20


class ResidencyGate:
    """Pins a sequence's adapter when it starts and unpins it when it ends.

    If the content of a version is gone from disk, a request that has not started any answer moves to the new
    version of its adapter, with all its answers at once. It fails instead if the new version has another chat
    template, because the prompt was rendered with the old one. A request that has started keeps its version.
    An answer of it fails if that version can no longer be loaded.

    Attributes:
        failures: sequences that cannot be admitted, and why. The engine collects them.
    """

    def __init__(
        self, residency: Residency, registry: Registry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures: list[tuple[Sequence, AdapterError]] = []
        self._residency = residency
        self._registry = registry
        self._clock = clock

    def prepare(self, sequence: Sequence) -> bool:
        if sequence.adapter is None:
            return True
        if not self._may_try(sequence.shared):
            return False
        try:
            return self._residency.prepare(sequence.adapter, sequence)
        except AdapterError as error:
            self._refused(sequence, error)
        return False

    def admit(self, sequence: Sequence) -> bool:
        if sequence.adapter is None:
            return True
        if not self._may_try(sequence.shared):
            return False
        try:
            slot = self._residency.pin(sequence.adapter, sequence)
        except AdapterError as error:
            self._refused(sequence, error)
            return False
        if slot is not None:
            sequence.slot = slot
        return slot is not None

    def leave(self, sequence: Sequence) -> None:
        if sequence.adapter is None:
            return
        if sequence.slot >= 0:
            self._residency.unpin(sequence.adapter.digest)
        else:
            self._residency.cancel(sequence.adapter.digest, sequence)
        sequence.slot = -1

    def take_failures(self) -> list[tuple[Sequence, AdapterError]]:
        failures, self.failures = self.failures, []
        return failures

    def _may_try(self, shared: Shared) -> bool:
        return shared.not_before <= self._clock()

    def _refused(self, sequence: Sequence, error: AdapterError) -> None:
        if isinstance(error, AdapterChanged) and not sequence.shared.started:
            self._rebind(sequence, error)
        else:
            self.failures.append((sequence, error))

    def _rebind(self, sequence: Sequence, error: AdapterChanged) -> None:
        """Move to the current version of the name. The watcher may need a moment to see the change."""
        shared, old = sequence.shared, sequence.adapter
        assert old is not None
        try:
            new = self._registry.resolve(old.name)
        except AdapterError as gone:
            self.failures.append((sequence, gone))
            return
        if new.info.chat_config != old.info.chat_config:
            self.failures.append((sequence, error))
            return
        if new is not old:
            self._registry.acquire(new)
            shared.version = new
            self._registry.release(old)
        else:
            shared.not_before = self._clock() + _REBIND_EVERY
        shared.attempts += 1
        if shared.attempts > _REBIND_TRIES:
            self.failures.append((sequence, error))
