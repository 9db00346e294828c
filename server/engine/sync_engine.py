"""An engine that is stepped by whoever calls: no HTTP, no event loop, no thread of its own.

``offline.LLM``, the evaluation and ``gpu-check`` use it; vLLM calls the same ``LLMEngine``.
"""

from __future__ import annotations

import threading

from adapters.registry import Version
from server.engine.build import Parts
from server.engine.engine import Output
from server.engine.interface import GenerationRequest

_RETRY_WAITING = 0.05
"""Seconds after which waiting requests are looked at again when nothing runs."""


class SyncEngine:
    """The engine of ``parts``, which serve nobody else meanwhile. One thread may use it at a time."""

    def __init__(self, parts: Parts) -> None:
        self._engine = parts.engine
        self._registry = parts.registry
        self._adapters_changed = threading.Event()
        parts.residency.on_change = self._adapters_changed.set

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return self._engine.busy

    def add(
        self,
        request: GenerationRequest,
        version: Version | None,
        seed: int = 0,
        eos: frozenset[int] | None = None,
    ) -> None:
        """Queue a request on an adapter's version, which stays until the request ends; None = the base.

        ``seed`` and ``eos`` are as for ``Engine.add``.
        """
        if version is not None:
            self._registry.acquire(version)
        self._engine.add(request, version, seed, eos)

    def abort(self, request_id: str) -> None:
        """End a request now; harmless if it has ended."""
        self._engine.abort(request_id)

    def abort_answer(self, request_id: str, index: int) -> None:
        """End one answer of a request."""
        self._engine.abort_answer(request_id, index)

    def step(self) -> list[Output]:
        """Make one step. If every request waits for an adapter, wait until one is loaded."""
        self._adapters_changed.clear()
        outputs = self._engine.step()
        if not outputs and self._engine.busy and not self._engine.running:
            self._adapters_changed.wait(_RETRY_WAITING)
        return outputs

    def take_ended(self) -> list[str]:
        """Requests that have ended, in whichever way, since the last call."""
        return self._engine.take_ended()
