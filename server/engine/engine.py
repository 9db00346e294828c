"""One engine step: schedule, run the model, sample, read, book. Everything runs on one thread.

With asynchronous scheduling, a step is launched before the previous step's tokens are read, so the device
never waits for the host. The engine then learns one step late that a sequence has ended, and discards the
extra token.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adapters.errors import ManyloraError
from adapters.registry import Registry, Version
from server.engine import faults
from server.engine.admission import ResidencyGate
from server.engine.in_flight import InFlightStep
from server.engine.interface import FinishReason, GenerationRequest
from server.engine.sampling.rng import answer_seed
from server.engine.sampling.sampler import RankedLogprobs, Sample, sample
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence, Shared
from server.errors import RequestFailed

log = logging.getLogger("manylora.engine")


class Model(Protocol):
    """See ``server.engine.model.StepModel``."""

    def __call__(self, chunks: SequenceOf[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        """Chunks to float32 logits [chunks that sample, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one step produced for one answer: a token, or the error that ended its request.

    Attributes:
        cached: prompt tokens that came from the prefix cache.
        digest: of the adapter version that serves the answer; None = the base.
        started: time (``time.monotonic``) of the first step that computed part of the answer.
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
        model: runs a step's chunks. It is also an attribute, so that callers can wrap it to see the logits.
        scheduler: decides what a step computes; its gate must be ``gate``.
        gate: pins adapters.
        registry: counts the users of each adapter version.
        eos: the base's end-of-sequence tokens.
        async_scheduling: launch each step before the previous one is read. The tokens are the same.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        gate: ResidencyGate,
        registry: Registry,
        eos: frozenset[int],
        async_scheduling: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.sample = sample
        self._gate = gate
        self._registry = registry
        self._eos = eos
        self._async_scheduling = async_scheduling
        self._in_flight: InFlightStep | None = None
        self._arrivals = itertools.count()
        self._live: dict[str, list[Sequence]] = {}
        self._held: dict[str, list[Sequence]] = {}
        self._ended_ids: list[str] = []

    def add(
        self,
        request: GenerationRequest,
        adapter: Version | None,
        seed: int,
        eos: frozenset[int] | None = None,
    ) -> None:
        """Queue a request. The caller has acquired ``adapter`` once; the engine releases it.

        ``eos``: the tokens that end its answers; None = the base's.

        If the request asks for several answers, the first one runs alone until its prompt is computed. The
        others then find the prompt in the prefix cache.
        """
        shared = Shared(adapter)
        answers = [
            Sequence(
                request.request_id, index, request.prompt, adapter, request.sampling,
                answer_seed(seed, index), next(self._arrivals), self._eos if eos is None else eos, shared,
            )
            for index in range(request.sampling.n)
        ]  # fmt: skip
        self._live[request.request_id] = answers
        if answers[1:]:
            self._held[request.request_id] = answers[1:]
        self.scheduler.add(answers[0])

    def abort(self, request_id: str) -> None:
        """End a request now and free everything it holds. Does nothing if the request has ended."""
        self._held.pop(request_id, None)
        for sequence in list(self._live.get(request_id, [])):
            self.scheduler.remove(sequence)
            self._ended(sequence)

    def abort_answer(self, request_id: str, index: int) -> None:
        """End one answer of a request, because its stop string was found."""
        answers = self._live.get(request_id, [])
        for sequence in [s for s in answers if s.index == index]:
            self._unhold(request_id)
            self.scheduler.remove(sequence)
            self._ended(sequence)

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or self._in_flight is not None

    @property
    def running(self) -> bool:
        return len(self.scheduler.running) > 0 or self._in_flight is not None

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to start or to resume; may be read from any thread."""
        return self.scheduler.num_waiting

    def take_ended(self) -> list[str]:
        """The ids of the requests that have ended, for whatever reason, since the last call."""
        ended, self._ended_ids = self._ended_ids, []
        return ended

    def step(self) -> list[Output]:
        """Launch one forward pass, then read and book a step.

        The step that is read is the one just launched, or with asynchronous scheduling the one before it.
        """
        batch = self.scheduler.schedule()
        outputs = [self._fail(sequence, error) for sequence, error in self._gate.take_failures()]
        if outputs:  # the failure of one answer ends its request's other answers too
            batch = self._without_ended(batch)
        self._note_starts(batch)
        try:
            in_flight = self._launch(batch)
        except Exception as error:
            return [*outputs, *self._complete(self._take_in_flight()), *self._in_halves(batch, error)]
        if self._async_scheduling:
            in_flight, self._in_flight = self._in_flight, in_flight
        return [*outputs, *self._complete(in_flight)]

    def check_idle(self) -> None:
        """Assert that nothing is held when nothing runs (for tests)."""
        self.scheduler.check_integrity()
        assert self._in_flight is None, "a step is still in flight"
        assert not self._live, f"requests that never ended: {list(self._live)}"
        assert not self._held, "answers are held back for a request that has ended"

    # -- launching --------------------------------------------------------------------------------

    def _launch(self, batch: list[Chunk]) -> InFlightStep | None:
        """Queue a batch on the device; None if the batch is empty. If this raises, nothing is booked."""
        if not batch:
            return None
        prev_tokens = self._in_flight.tokens if self._in_flight else None
        logits = self.model(batch, prev_tokens=prev_tokens)
        samples = self.sample(logits, [chunk.sequence for chunk in batch if chunk.samples], prev_tokens)
        self.scheduler.launched(batch, async_scheduling=self._async_scheduling)
        return InFlightStep(batch, samples)

    def _without_ended(self, batch: list[Chunk]) -> list[Chunk]:
        """The batch without the sequences that have ended since it was scheduled."""
        return [chunk for chunk in batch if self._is_live(chunk.sequence)]

    def _is_live(self, sequence: Sequence) -> bool:
        return sequence in self._live.get(sequence.request_id, ())

    def _take_in_flight(self) -> InFlightStep | None:
        in_flight, self._in_flight = self._in_flight, None
        return in_flight

    # -- completing -------------------------------------------------------------------------------

    def _complete(self, in_flight: InFlightStep | None) -> list[Output]:
        """Read a launched step and book its results."""
        if in_flight is None:
            return []
        try:
            results = in_flight.read()
        except Exception as error:
            self._roll_back(self._take_in_flight())  # it was computed from the tokens of the step that failed
            self._roll_back(in_flight)
            return self._in_halves(in_flight.chunks, error)
        self.scheduler.completed(in_flight.chunks)
        return list(self._book(results))

    def _roll_back(self, in_flight: InFlightStep | None) -> None:
        """Undo the launch of a step."""
        if in_flight is not None:
            for chunk in self._without_ended(in_flight.chunks):
                self.scheduler.roll_back(chunk)
            self.scheduler.completed(in_flight.chunks)

    def _in_halves(self, batch: list[Chunk], raised: Exception) -> list[Output]:
        """Bisect a batch that raised, until only the sequences at fault fail.

        Running a chunk again is harmless: it writes the same keys and values to the same KV slots.
        """
        log.warning("a step of %d sequences raised; running it again in halves", len(batch), exc_info=raised)
        faults.recover(raised)
        middle = len(batch) // 2
        halves = batch[:middle], batch[middle:]
        return [out for half in halves for out in self._launch_and_complete(self._without_ended(half))]

    def _launch_and_complete(self, batch: list[Chunk]) -> list[Output]:
        """Launch a batch and read it at once."""
        in_flight = None
        try:
            in_flight = self._launch(batch)
            results = in_flight.read() if in_flight else []
        except Exception as error:
            self._roll_back(in_flight)
            if len(batch) > 1:
                return self._in_halves(batch, error)
            log.exception("request %s raised", batch[0].sequence.request_id)
            return [self._fail(batch[0].sequence, faults.error_for(error))]
        self.scheduler.completed(batch)
        return list(self._book(results))

    # -- booking ----------------------------------------------------------------------------------

    def _book(self, results: Iterable[tuple[Chunk, Sample | None]]) -> Iterable[Output]:
        for chunk, result in results:
            sequence = chunk.sequence
            if not self._is_live(sequence):  # it ended a step ago, or just now
                continue
            if result is None:
                self.scheduler.advance(chunk, None)
            elif result.token is None:
                yield self._fail(
                    sequence, RequestFailed("The model's output for this request is not finite.")
                )
            else:
                if result.revised:
                    self._discard_in_flight(sequence)
                yield self._advance(chunk, result.token, result.logprobs)

    def _discard_in_flight(self, sequence: Sequence) -> None:
        """Ignore the sequence's chunk in flight: it was computed from a token that has been revised."""
        chunk = self._in_flight.discard(sequence) if self._in_flight else None
        if chunk is not None:
            self.scheduler.roll_back(chunk)

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
