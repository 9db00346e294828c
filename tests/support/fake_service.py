"""A ``Service`` without a model. Prompt tokens are bytes, answers are `` a b c …``. It can fail and hang."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from adapters.errors import AdapterExists, AdapterNotFound
from server.engine.interface import (
    AdapterStatus,
    Delta,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    TokenLogprob,
)
from server.errors import ShuttingDown


def token(number: int, top: int | None = None) -> TokenLogprob:
    """The token ``number`` of an answer, with ``top`` alternatives."""
    text = f" {chr(ord('a') + number % 26)}"
    likely = tuple(token(number + step) for step in range(top or 0))
    return TokenLogprob(number, text, text.encode(), math.log(1 / (number + 2)), likely)


BASE = ModelInfo(
    "tiny",
    (),
    "sha256:base",
    "nf4",
    max_model_len=64,
    created=1000.0,
    attention="fake",
    weight_bytes={"nf4": 900, "bf16": 300, "bf16_experts": 0},
)


@dataclass(eq=False)
class FakeGeneration:
    """A generation of ``max_tokens`` tokens for each answer. It may fail or hang at one of them."""

    request: GenerationRequest
    service: FakeService
    cancelled: bool = False
    cached_tokens: int = 4
    queue_seconds: float | None = 0.25

    @property
    def fingerprint(self) -> str:
        return "nf4-base" + (f"-lora-{self.request.adapter}" if self.request.adapter else "")

    def cancel(self) -> None:
        self.cancelled = True
        self.service.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        sampling, service = self.request.sampling, self.service
        for number in range(sampling.max_tokens):
            if number == service.fail_at:
                raise service.error
            if number == service.hang_at:
                await service.resume.wait()
            await asyncio.sleep(0)
            sampled = token(number, sampling.logprobs)
            last = "length" if number + 1 == sampling.max_tokens else None
            logprobs = None if sampling.logprobs is None else (sampled,)
            for index in range(sampling.n):
                yield Delta(index, sampled.token, (number,), logprobs, "length" if last else None)
        service.running.discard(self)


@dataclass(eq=False)
class FakeService:
    """Tests set its fields. ``requests`` are the submitted ones, ``running`` those that have not ended."""

    base: ModelInfo = BASE
    known: dict[str, AdapterStatus] = field(default_factory=dict)
    on_disk: dict[str, AdapterStatus] = field(default_factory=dict)
    looked_for: list[str] = field(default_factory=list)
    fail_at: int | None = None
    hang_at: int | None = None
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception = field(default_factory=lambda: ValueError("a bug"))
    refusal: Exception | None = None
    dead: str | None = None
    is_draining: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    conversations: list[list[dict[str, str]]] = field(default_factory=list)
    running: set[FakeGeneration] = field(default_factory=set)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), waiting=3, kv_blocks_total=10, steps=7)

    def failure(self) -> str | None:
        return self.dead

    def draining(self) -> bool:
        return self.is_draining

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def holding(self, adapter: str | None) -> AbstractContextManager[None]:  # noqa: ARG002
        """A version for requests. The fake has only one version of each adapter."""
        return nullcontext()

    async def render_chat(self, messages: list[dict[str, str]], _: object = None) -> list[int]:
        self.conversations.append(messages)
        return [1, *"".join(message["content"] for message in messages).encode()]

    async def submit(self, request: GenerationRequest) -> FakeGeneration:
        if self.is_draining:
            raise ShuttingDown("The server is shutting down; send the request elsewhere.")
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        generation = FakeGeneration(request, self)
        self.running.add(generation)
        return generation

    def adapters(self) -> list[AdapterStatus]:
        return list(self.known.values())

    def adapter(self, name: str) -> AdapterStatus | None:
        return self.known.get(name)

    def adapter_names(self) -> list[str]:
        return [name for name in self.known if self.has_adapter(name)]

    def has_adapter(self, name: str) -> bool:
        return name in self.known and self.known[name].state == "ready"

    async def find_adapter(self, name: str) -> bool:
        self.looked_for.append(name)
        if name in self.on_disk:
            self.known[name] = self.on_disk.pop(name)
        return self.has_adapter(name)

    async def load_adapter(self, name: str, path: str, replace: bool) -> AdapterStatus:
        if name in self.known and not replace:
            raise AdapterExists(f"Adapter '{name}' exists; set 'load_inplace' to replace it.")
        self.known[name] = adapter(name, path=path)
        return self.known[name]

    async def unload_adapter(self, name: str) -> None:
        if self.known.pop(name, None) is None:
            raise AdapterNotFound(f"There is no adapter '{name}'.")


def adapter(name: str, path: str = "", **changes: object) -> AdapterStatus:
    """The status of a ready adapter, with ``changes``."""
    fields: dict[str, object] = {
        "state": "ready",
        "digest": f"sha256:{name}",
        "rank": 8,
        "nbytes": 1024,
        "tier": "disk",
        "in_flight": 0,
        "last_used": None,
        "created": 2000.0,
        "path": path or f"/srv/adapters/{name}",
    }
    return AdapterStatus(name=name, **(fields | changes))  # type: ignore[arg-type]
