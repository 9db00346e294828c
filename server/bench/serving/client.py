"""The load generator: sends a workload to an OpenAI-compatible server and records when tokens arrive.

It is one process with one event loop, and opens one connection for each call. Its own CPU time is measured
(``RunResult.generator_cpu``).
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.bench.errors import BenchError
from server.bench.serving.endpoint import Endpoint
from server.bench.serving.post import post
from server.bench.serving.sse import SSEDecoder
from server.bench.serving.stats import CallRecord, RunResult
from server.bench.serving.workload import Call, Workload

# A request that takes longer has failed, so that a benchmark always ends.
_TIMEOUT_S = 600.0


async def play(endpoint: Endpoint, workload: Workload) -> RunResult:
    """Send every call when it is due, within the concurrency bound. Failures are recorded, not raised."""
    gate = asyncio.Semaphore(workload.max_concurrency or max(1, len(workload.calls)))
    gc.collect()
    gc.freeze()  # avoids long garbage collections while tokens are timed
    start, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_play_one(endpoint, call, gate, start)) for call in workload.calls]
    cpu = time.process_time() - cpu
    gc.unfreeze()
    return RunResult(tuple(task.result() for task in tasks), cpu)


async def _play_one(endpoint: Endpoint, call: Call, gate: asyncio.Semaphore, start: float) -> CallRecord:
    await asyncio.sleep(start + call.due - time.perf_counter())
    async with gate:
        answer = Answer(sent=time.perf_counter() - start)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await _stream(endpoint, call, answer, start)
        except (OSError, ValueError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer.record(call.max_tokens)


async def _stream(endpoint: Endpoint, call: Call, answer: Answer, start: float) -> None:
    decoder = SSEDecoder()

    def take(piece: bytes) -> None:
        now = time.perf_counter() - start
        for event in decoder.feed(piece):
            answer.take(event, now)

    url = endpoint.base_url.rstrip("/") + endpoint.path
    done = await post(url, endpoint.api_key, payload(endpoint, call), take)
    if done.status != 200:
        answer.error = f"HTTP {done.status}: {done.refusal.decode(errors='replace')[:300]}"


def payload(endpoint: Endpoint, call: Call) -> dict[str, Any]:
    """The request's body. It asks for a greedy, streamed answer of exactly ``max_tokens`` tokens."""
    prompt: dict[str, Any] = (
        {"prompt": call.prompt}
        if endpoint.path == "/v1/completions"
        else {"messages": [{"role": "user", "content": call.text}]}
    )
    body = {
        "model": call.adapter or endpoint.base_model,
        "max_tokens": call.max_tokens,
        "min_tokens": call.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return prompt | body | dict(endpoint.fields.get(call.adapter, {}))


@dataclass(slots=True)
class Answer:
    """One streamed answer while it arrives."""

    sent: float
    error: str | None = None
    _chunks: list[float] = field(default_factory=list)
    _finished: float | None = None
    _done: bool = False
    _usage: dict[str, Any] = field(default_factory=dict)

    def take(self, data: bytes, now: float) -> None:
        """Take one event's data, which arrived at ``now``."""
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = json.loads(data)
            self._take_event(event, now)
        except (ValueError, LookupError, TypeError, AttributeError):
            self.error = self.error or f"not a completion chunk: {data[:300].decode(errors='replace')}"

    def _take_event(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            self.error = f"error within the stream: {json.dumps(event['error'])[:300]}"
            return
        self._usage = event.get("usage") or self._usage
        if not event["choices"]:
            return
        choice = event["choices"][0]
        if _holds_token(choice):
            self._chunks.append(now)
        elif choice.get("finish_reason"):
            self._finished = now

    def record(self, wanted_tokens: int) -> CallRecord:
        """The record, once the stream has ended. It has an error unless ``wanted_tokens`` tokens arrived."""
        output = self._usage.get("completion_tokens", 0)
        if self._finished is not None and len(self._chunks) < output:
            self._chunks.append(self._finished)  # the last token has no text of its own
        details = self._usage.get("prompt_tokens_details") or {}
        return CallRecord(
            sent=self.sent,
            chunks=tuple(self._chunks),
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            cached_tokens=details.get("cached_tokens") or 0,
            output_tokens=output,
            error=self.error or self._shortcoming(output, wanted_tokens),
        )

    def _shortcoming(self, output: int, wanted: int) -> str | None:
        if not self._done:
            return "the stream ended before [DONE]"
        if not self._usage:
            return "the stream had no usage; the server must support stream_options.include_usage"
        if output != wanted or not self._chunks:
            return f"{output} tokens arrived in {len(self._chunks)} chunks; {wanted} tokens were asked for"
        return None


def _holds_token(choice: dict[str, Any]) -> bool:
    """Whether a choice stands for tokens, even if their text is empty.

    Chat's first chunk has only a role, and the last one may have only a finish reason.
    """
    text = choice.get("text")
    if text is None:
        delta = choice["delta"]
        text = delta.get("content")
        if not text and "role" in delta:
            return False
    return bool(text) or not choice.get("finish_reason")


async def discover(base_url: str, api_key: str | None) -> tuple[str, tuple[str, ...]]:
    """The names of the base and the adapters, from ``/v1/models``. As in vLLM, adapters have a ``parent``.

    Raises:
        BenchError: the server gave no valid list, or a list without a base.
    """
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with httpx.AsyncClient(base_url=base_url, headers=headers, trust_env=False) as client:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise BenchError(
            f"{base_url}/v1/models does not list models ({error}); is it an OpenAI-compatible server?"
        ) from error
    bases = [model["id"] for model in models if not model.get("parent")]
    if not bases:
        raise BenchError(f"{base_url}/v1/models lists no base model; name the models with --model")
    return bases[0], tuple(model["id"] for model in models if model.get("parent"))
