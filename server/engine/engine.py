"""The loop's body: schedule, run the model, sample, book. Synchronous, on one thread, and easy to test."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from adapters.errors import ManyloraError
from adapters.registry import Registry, Version
from server.engine.admission import ResidencyGate
from server.engine.random_draws import answer_seed
from server.engine.request import FinishReason, GenerationRequest
from server.engine.sampler import Draw, RankedLogprobs, sample
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence
from server.errors import RequestFailed

log = logging.getLogger("manylora.engine")

Model = Callable[[SequenceOf[Chunk]], Tensor]
"""Chunks to float32 logits [chunks that sample, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step did for one answer: a token, or the error that ended its request.

    Attributes:
        cached: prompt tokens that came from the prefix cache.
        digest: of the adapter version that is serving it; None = the base.
        started: clock (``time.monotonic``) at the first step that took it up.
        reason: set on the last token.
    """

    request_id: str
    index: int
    token: int
    cached: int = 0
    digest: str | None = None
    started: float = 0.0
    logprobs: RankedLogprobs | None = None
    reason: FinishReason | None = None
    error: ManyloraError | None = None


class Engine:
    """Requests in, outputs out, one ``step`` at a time.

    Args:
        model: runs a step's chunks; also an attribute, so that one can look at the logits in between.
        scheduler: decides what a step computes; its gate must be ``gate``.
        gate: pins adapters.
        registry: counts who uses which version.
        eos: the base's end-of-sequence tokens.
    """

    def __init__(
        self, model: Model, scheduler: Scheduler, gate: ResidencyGate, registry: Registry, eos: frozenset[int]
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.sample = sample
        self._gate = gate
        self._registry = registry
        self._eos = eos
        self._arrivals = itertools.count()
        self._live: dict[str, list[Sequence]] = {}
        self._held: dict[str, list[Sequence]] = {}
        self._ended_ids: list[str] = []

    def add(self, request: GenerationRequest, adapter: Version | None, seed: int) -> None:
        """Queue a request. ``adapter`` has been acquired once by the caller; the engine releases it.

        Of several answers the first runs alone until its prompt is computed: the others then find the
        prompt in the prefix cache.
        """
        answers = [
            Sequence(
                request.request_id, index, request.prompt, adapter, request.sampling,
                answer_seed(seed, index), next(self._arrivals), self._eos,
            )
            for index in range(request.sampling.n)
        ]  # fmt: skip
        for _ in answers[1:]:
            if adapter is not None:
                self._registry.acquire(adapter)
        self._live[request.request_id] = answers
        if answers[1:]:
            self._held[request.request_id] = answers[1:]
        self.scheduler.add(answers[0])

    def abort(self, request_id: str) -> None:
        """End a request now and free all it holds; harmless if it has ended."""
        self._held.pop(request_id, None)
        for sequence in list(self._live.get(request_id, [])):
            self.scheduler.remove(sequence)
            self._ended(sequence)

    def abort_answer(self, request_id: str, index: int) -> None:
        """End one answer of a request (its stop string was seen)."""
        answers = self._live.get(request_id, [])
        for sequence in [s for s in answers if s.index == index]:
            self._unhold(request_id)
            self.scheduler.remove(sequence)
            self._ended(sequence)

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0

    @property
    def running(self) -> bool:
        return len(self.scheduler.running) > 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to start or to come back; may be read from any thread."""
        return len(self.scheduler.waiting) + len(self.scheduler.preempted)

    def take_ended(self) -> list[str]:
        """Requests that have ended, in whichever way, since the last call."""
        ended, self._ended_ids = self._ended_ids, []
        return ended

    def step(self) -> list[Output]:
        """One forward pass over whatever is ready; empty if nothing is."""
        batch = self.scheduler.schedule()
        self._note_starts(batch)
        failed = [self._fail(sequence, error) for sequence, error in self._gate.take_failures()]
        draws = self._compute(batch) if batch else []
        return failed + list(self._book(batch, draws))

    def check_idle(self) -> None:
        """Assert that nothing is held when nothing runs (for tests)."""
        self.scheduler.check_integrity()
        assert not self._live, f"requests that never ended: {list(self._live)}"
        assert not self._held, "answers are held back for a request that is gone"

    # -- computing --------------------------------------------------------------------------------

    def _compute(self, batch: SequenceOf[Chunk]) -> list[Draw | Exception | None]:
        """By chunk: its draw, None if it does not sample, or what it raised.

        If the batch raises, each sequence is tried alone, so that the one at fault fails and no other.
        Running a chunk twice is harmless: it writes the same keys and values to the same places.
        """
        try:
            return self._draw(batch)
        except Exception as error:
            if len(batch) == 1:
                log.exception("request %s raised", batch[0].sequence.request_id)
                return [error]
            log.warning("a step raised %r; trying its %d sequences one by one", error, len(batch))
            return [result for chunk in batch for result in self._compute([chunk])]

    def _draw(self, batch: SequenceOf[Chunk]) -> list[Draw | Exception | None]:
        logits = self.model(batch)
        draws = iter(self.sample(logits, [chunk.sequence for chunk in batch if chunk.samples]))
        return [next(draws) if chunk.samples else None for chunk in batch]

    # -- booking ----------------------------------------------------------------------------------

    def _book(self, batch: SequenceOf[Chunk], draws: SequenceOf[Draw | Exception | None]) -> Iterable[Output]:
        for chunk, draw in zip(batch, draws, strict=True):
            sequence = chunk.sequence
            if sequence.request_id not in self._live:  # a sibling's failure ended the request
                continue
            if isinstance(draw, Exception):
                yield self._fail(
                    sequence, RequestFailed(f"Processing the request raised {type(draw).__name__}.")
                )
            elif draw is None:
                self.scheduler.advance(chunk, None)
            elif draw.token is None:
                yield self._fail(
                    sequence, RequestFailed("The model's output for this request is not finite.")
                )
            else:
                yield self._advance(chunk, draw.token, draw.logprobs)

    def _note_starts(self, batch: SequenceOf[Chunk]) -> None:
        now = time.monotonic()
        for chunk in batch:
            if chunk.sequence.started is None:
                chunk.sequence.started = now

    def _advance(self, chunk: Chunk, token: int, logprobs: RankedLogprobs | None) -> Output:
        sequence = chunk.sequence
        digest = sequence.digest
        reason = self.scheduler.advance(chunk, token)
        self._unhold(sequence.request_id)
        if reason is not None:
            self._ended(sequence)
        return Output(
            sequence.request_id,
            sequence.index,
            token,
            cached=sequence.num_cached or 0,
            digest=digest,
            started=sequence.started or 0.0,
            logprobs=logprobs,
            reason=reason,
        )

    def _fail(self, sequence: Sequence, error: ManyloraError) -> Output:
        self.abort(sequence.request_id)
        return Output(sequence.request_id, sequence.index, token=-1, error=error)

    def _unhold(self, request_id: str) -> None:
        for sibling in self._held.pop(request_id, []):
            self.scheduler.add(sibling)

    def _ended(self, sequence: Sequence) -> None:
        answers = self._live[sequence.request_id]
        answers.remove(sequence)
        if not answers:
            del self._live[sequence.request_id]
            self._ended_ids.append(sequence.request_id)
        if sequence.adapter is not None:
            self._registry.release(sequence.adapter)
