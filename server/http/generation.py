"""Turn a checked body into a ``CompletionStream``: find the model, check lengths, submit, merge, measure.

Chat and plain completions share this module. ``respond.py`` makes the HTTP response.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from server.engine.interface import Delta, Generation, GenerationRequest, TokenLogprob
from server.engine.sampling_params import SamplingParams
from server.errors import PromptTooLong
from server.http.context import Context
from server.http.metrics import Metrics
from server.http.models import resolve_adapter
from server.http.record import Record
from server.http.schema import Generate, UsageInStream

if TYPE_CHECKING:
    from adapters.registry import Version


def room_for_answer(
    field: str, prompt_tokens: int, asked: int | None, context: int, default: int | None
) -> int:
    """The most tokens that the answer may have: ``asked``, or else ``default``, or else all that fit.

    Raises PromptTooLong. ``field`` is the name of the field that holds the prompt.
    """
    room = context - prompt_tokens
    if room < (asked or 1):
        raise PromptTooLong(field, context, prompt_tokens, asked)
    return min(room, default or room) if asked is None else asked


async def begin(record: Record, context: Context, body: Generate, prefix: str) -> None:
    """Record the request's model, adapter, id and user, before any work for the prompt.

    Raises ModelNotFound, ModelUnavailable or AdapterNotReady.
    """
    record.model = body.model
    record.adapter = await resolve_adapter(context.service, body.model)
    record.completion_id = f"{prefix}-{uuid.uuid4().hex}"
    if body.user is not None:
        record.user = hashlib.sha256(body.user.encode()).hexdigest()[:16]


async def submit(
    record: Record,
    context: Context,
    version: Version | None,
    prompts: Sequence[tuple[tuple[int, ...], SamplingParams]],
) -> CompletionStream:
    """Queue one generation for each prompt. If one is refused, all are cancelled.

    ``version`` is the adapter version that the prompts were rendered for.
    """
    generations: list[Generation] = []
    try:
        for number, (prompt, sampling) in enumerate(prompts):
            request = GenerationRequest(
                f"{record.completion_id}-{number}", prompt, record.adapter, sampling, version
            )
            generations.append(await context.service.submit(request))
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise
    record.generated = True
    record.prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
    return CompletionStream(tuple(generations), prompts[0][1].n, record, context.metrics)


@dataclass(slots=True)
class CompletionStream:
    """The generations of one HTTP request, as one stream of deltas.

    Attributes:
        n: completions for each prompt. Completion ``i`` of prompt ``p`` has the index ``p * n + i``.
        created: UNIX seconds.
    """

    generations: tuple[Generation, ...]
    n: int
    record: Record
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    _last: dict[int, float] = field(default_factory=dict)

    @property
    def choices(self) -> int:
        return len(self.generations) * self.n

    def usage_so_far(self, wanted: UsageInStream) -> dict[str, Any]:
        """The field ``usage`` of the next chunk, as a dict; empty if the chunk has no such field."""
        if wanted == "none":
            return {}
        return {"usage": self.usage() if wanted == "every chunk" else None}

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every delta as it arrives, with its index over all prompts. Raises what a generation raises."""
        async with aclosing(_merged(self.generations)) as merged:
            async for number, delta in merged:
                numbered = replace(delta, index=number * self.n + delta.index) if number else delta
                self._measure(numbered)
                yield numbered

    def cancel(self) -> None:
        """Cancel all generations. A call after their end does nothing."""
        for generation in self.generations:
            generation.cancel()

    def envelope(self, kind: str) -> dict[str, Any]:
        """The fields that every answer and every chunk of this request have."""
        return {
            "id": self.record.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.record.model,
            "system_fingerprint": self.generations[0].fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage`` object, up to now."""
        record = self.record
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        }

    def _measure(self, delta: Delta) -> None:
        tokens = len(delta.token_ids)
        if not tokens:
            return
        now, record = time.perf_counter(), self.record
        if record.ttft is None:
            record.ttft = now - record.started
            self.metrics.first_token(record.ttft)
        if delta.index in self._last:
            self.metrics.next_tokens((now - self._last[delta.index]) / tokens)
        else:
            record.cached_tokens = sum(generation.cached_tokens for generation in self.generations)
            record.queue_seconds = max((g.queue_seconds or 0.0 for g in self.generations), default=None)
        self._last[delta.index] = now
        record.completion_tokens += tokens


@dataclass(slots=True)
class Completion:
    """One complete choice, joined from its deltas."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


async def collect(stream: CompletionStream) -> list[Completion]:
    """Wait for the end of ``stream``; its completions, by index."""
    completions = [Completion() for _ in range(stream.choices)]
    async for delta in stream.deltas():
        completion = completions[delta.index]
        completion.text += delta.text
        completion.logprobs.extend(delta.logprobs or ())
        completion.finish_reason = delta.finish_reason or completion.finish_reason
        completion.stop_reason = (
            delta.stop_reason if delta.stop_reason is not None else completion.stop_reason
        )
    return completions


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several generations in the order of arrival, each with its generation's number."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    # The size is 1: unread deltas stay in their generation, which limits them.
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(maxsize=1)
    pumps = [asyncio.create_task(_pump(number, each, queue)) for number, each in enumerate(generations)]
    try:
        open_streams = len(pumps)
        while open_streams:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield number, item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(
    number: int, generation: Generation, queue: asyncio.Queue[tuple[int, Delta | Exception | None]]
) -> None:
    try:
        async for delta in generation:
            await queue.put((number, delta))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
