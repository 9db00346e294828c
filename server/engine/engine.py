"""The loop's body: schedule, run the model, draw, read, book. On one thread, and easy to test.

On a device of its own, a step is launched *ahead*: before the tokens of the one before it are read, so that
the device never waits for the host. What ends is seen a step late, and the token too much is thrown away.
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
from server.engine.in_flight import Flight
from server.engine.interface import FinishReason, GenerationRequest
from server.engine.sampling.rng import answer_seed
from server.engine.sampling.sampler import Draw, RankedLogprobs, draw
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence, Shared
from server.errors import RequestFailed

log = logging.getLogger("manylora.engine")


class Model(Protocol):
    """See ``server.engine.model.StepModel``."""

    def __call__(self, chunks: SequenceOf[Chunk], *, drawn: Tensor | None = None) -> Tensor:
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
        ahead: launch each step before the one before it is read; the tokens are the same.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        gate: ResidencyGate,
        registry: Registry,
        eos: frozenset[int],
        ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self.draw = draw
        self._gate = gate
        self._registry = registry
        self._eos = eos
        self._ahead = ahead
        self._flight: Flight | None = None
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
        """Queue a request. ``adapter`` has been acquired once by the caller; the engine releases it.

        ``eos``: the tokens that end its answers; None = the base's.

        Of several answers the first runs alone until its prompt is computed: the others then find the
        prompt in the prefix cache.
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
        return len(self.scheduler) > 0 or self._flight is not None

    @property
    def running(self) -> bool:
        return len(self.scheduler.running) > 0 or self._flight is not None

    @property
    def num_waiting(self) -> int:
        """Sequences that wait to start or to come back; may be read from any thread."""
        return self.scheduler.num_waiting

    def take_ended(self) -> list[str]:
        """Requests that have ended, in whichever way, since the last call."""
        ended, self._ended_ids = self._ended_ids, []
        return ended

    def step(self) -> list[Output]:
        """Launch a forward pass over whatever is ready, and book it; ``ahead``: book the one before it."""
        batch = self.scheduler.schedule()
        outputs = [self._fail(sequence, error) for sequence, error in self._gate.take_failures()]
        if outputs:  # an answer's failure ends its siblings too
            batch = self._living(batch)
        self._note_starts(batch)
        try:
            flight = self._launch(batch)
        except Exception as error:
            return [*outputs, *self._land(self._take_flight()), *self._in_halves(batch, error)]
        if self._ahead:
            flight, self._flight = self._flight, flight
        return [*outputs, *self._land(flight)]

    def check_idle(self) -> None:
        """Assert that nothing is held when nothing runs (for tests)."""
        self.scheduler.check_integrity()
        assert self._flight is None, "a step has not landed"
        assert not self._live, f"requests that never ended: {list(self._live)}"
        assert not self._held, "answers are held back for a request that is gone"

    # -- launching --------------------------------------------------------------------------------

    def _launch(self, batch: list[Chunk]) -> Flight | None:
        """Queue a batch on the device; None if it is empty. If it raises, nothing is booked."""
        if not batch:
            return None
        unread = self._flight.tokens if self._flight else None
        logits = self.model(batch, drawn=unread)
        drawn = self.draw(logits, [chunk.sequence for chunk in batch if chunk.samples], unread)
        self.scheduler.launched(batch, go_on=self._ahead)
        return Flight(batch, drawn)

    def _living(self, batch: list[Chunk]) -> list[Chunk]:
        """Without the sequences that have ended since it was scheduled."""
        return [chunk for chunk in batch if self._lives(chunk.sequence)]

    def _lives(self, sequence: Sequence) -> bool:
        return sequence in self._live.get(sequence.request_id, ())

    def _take_flight(self) -> Flight | None:
        flight, self._flight = self._flight, None
        return flight

    # -- landing ----------------------------------------------------------------------------------

    def _land(self, flight: Flight | None) -> list[Output]:
        """Read a step and book it."""
        if flight is None:
            return []
        try:
            results = flight.read()
        except Exception as error:
            self._retract(self._take_flight())  # what was launched from its tokens
            self._retract(flight)
            return self._in_halves(flight.chunks, error)
        self.scheduler.landed(flight.chunks)
        return list(self._book(results))

    def _retract(self, flight: Flight | None) -> None:
        """As if it had never been launched."""
        if flight is not None:
            for chunk in self._living(flight.chunks):
                self.scheduler.retract(chunk)
            self.scheduler.landed(flight.chunks)

    def _in_halves(self, batch: list[Chunk], raised: Exception) -> list[Output]:
        """Compute what raised as a whole, until the sequences at fault are found, which fail, and no other.

        Running a chunk again is harmless: it writes the same keys and values to the same places.
        """
        log.warning("a step of %d sequences raised; trying it in halves", len(batch), exc_info=raised)
        faults.recover(raised)
        middle = len(batch) // 2
        return [out for half in (batch[:middle], batch[middle:]) for out in self._alone(self._living(half))]

    def _alone(self, batch: list[Chunk]) -> list[Output]:
        """Launch and land at once."""
        flight = None
        try:
            flight = self._launch(batch)
            results = flight.read() if flight else []
        except Exception as error:
            self._retract(flight)
            if len(batch) > 1:
                return self._in_halves(batch, error)
            log.exception("request %s raised", batch[0].sequence.request_id)
            return [self._fail(batch[0].sequence, faults.error_for(error))]
        self.scheduler.landed(batch)
        return list(self._book(results))

    # -- booking ----------------------------------------------------------------------------------

    def _book(self, results: Iterable[tuple[Chunk, Draw | None]]) -> Iterable[Output]:
        for chunk, result in results:
            sequence = chunk.sequence
            if not self._lives(sequence):  # it ended a step ago, or with a sibling just now
                continue
            if result is None:
                self.scheduler.advance(chunk, None)
            elif result.token is None:
                yield self._fail(
                    sequence, RequestFailed("The model's output for this request is not finite.")
                )
            else:
                if result.revised:
                    self._withdraw(sequence)
                yield self._advance(chunk, result.token, result.logprobs)

    def _withdraw(self, sequence: Sequence) -> None:
        """What is in flight for it goes on from a token that it does not have."""
        chunk = self._flight.withdraw(sequence) if self._flight else None
        if chunk is not None:
            self.scheduler.retract(chunk)

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
