"""The engine's nouns: what is asked for, and what comes back. No torch, no HTTP.

``GenerationRequest`` goes in through ``EngineService.submit`` and a ``Generation`` comes back, an
asynchronous iterator of ``Delta``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from server.engine.sampling_params import SamplingDefaults, SamplingParams

if TYPE_CHECKING:
    from adapters.registry import Version

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request as the engine takes it.

    Attributes:
        request_id: unique; also what the logs call it.
        prompt: token ids, at least one.
        adapter: the adapter's registered name; None = the base itself.
        sampling: see ``SamplingParams``.
        version: what ``Service.holding`` gave for the adapter: no other answers a prompt that was rendered
            for it. None = whichever is current.
    """

    request_id: str
    prompt: tuple[int, ...]
    adapter: str | None
    sampling: SamplingParams
    version: Version | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model (before penalties and temperature).

    Attributes:
        token: the token's own text (may be a replacement character for part of a character).
        token_bytes: the exact bytes the token stands for.
        top: the most likely tokens at this place, most likely first (empty inside ``top`` itself).
    """

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one answer.

    Attributes:
        index: which of the n answers.
        text: new text, possibly empty (held back for a stop string or a split character).
        token_ids: the tokens drawn since the last delta.
        logprobs: one per token in ``token_ids``, or None if not asked for.
        finish_reason: set on an answer's last delta, and only there.
        stop_reason: the stop string or stop token that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Generation(Protocol):
    """A running request. Iterate to its end, or call ``cancel``; it raises ``RequestError`` if it fails."""

    @property
    def fingerprint(self) -> str:
        """Names base and adapter digest: ``nf4-<base12>`` or ``nf4-<base12>-lora-<adapter12>``."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache (known once the first delta is there)."""

    @property
    def queue_seconds(self) -> float | None:
        """From submission until a step first took the request up; None while it waits."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """Stop at once and free everything; harmless when already ended."""


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One registered (or refused) adapter, for ``GET /v1/adapters`` and metrics.

    Attributes:
        state: ``ready``, ``draining`` (unloaded, requests still running), ``waiting`` (its files are not
            finished, or not read yet) or ``failed``.
        tier: where its weights are now: ``device``, ``host`` or ``disk``.
        rank: the largest rank of any of its modules.
        nbytes: bytes of its weights as served.
        last_used: UNIX seconds, or None.
        reason: why it failed, or what it waits for; None otherwise.
    """

    name: str
    state: Literal["ready", "draining", "waiting", "failed"]
    digest: str | None
    rank: int | None
    nbytes: int | None
    tier: Literal["device", "host", "disk"] | None
    in_flight: int
    last_used: float | None
    created: float
    path: str
    base_model: str | None = None
    warnings: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine for ``/metrics`` and ``/health``; counters only ever grow."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    pool_rows_total: int = 0
    pool_rows_used: int = 0
    adapter_evictions: int = 0
    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base as clients see it.

    Attributes:
        attention: what attends over its keys and values here.
        takes_reasoning: whether its chat template renders an assistant's reasoning.
        defaults: for requests that are silent about how to sample.
    """

    name: str
    served_names: tuple[str, ...]
    digest: str
    quantization: str
    max_model_len: int
    created: float
    attention: str
    head_quantization: str = "none"
    takes_reasoning: bool = False
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


class Service(Protocol):
    """What HTTP needs of the engine (``server/engine/service.py`` is the real one, tests have a fake).

    Coroutines run on the event loop and never block it. Errors are ``RequestError`` and ``AdapterError``.
    """

    @property
    def base(self) -> ModelInfo: ...

    def stats(self) -> EngineStats: ...

    def failure(self) -> str | None:
        """Why the engine's loop ended, or None while it runs."""

    def draining(self) -> bool: ...

    async def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the tokenizer adds."""

    def holding(self, adapter: str | None) -> AbstractContextManager[Version | None]:
        """The version of an adapter that answers a request that comes now, kept meanwhile.

        Raises ``AdapterError``.
        """

    async def render_chat(self, messages: list[dict[str, str]], version: Version | None = None) -> list[int]:
        """Token ids of a conversation through the version's chat template, or the base's, ready to answer."""

    async def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request. Raises at once what can be known at once (unknown adapter, queue full, …)."""

    def adapters(self) -> list[AdapterStatus]: ...

    def adapter(self, name: str) -> AdapterStatus | None:
        """What goes by the name; one that is draining only if nothing else does. Quick, as is the next."""

    def adapter_names(self) -> list[str]:
        """The names that can be asked for, in no order."""

    def has_adapter(self, name: str) -> bool: ...

    async def find_adapter(self, name: str) -> bool:
        """As ``has_adapter``, but the folder of an unknown name is looked at first: it may have just come."""

    async def load_adapter(self, name: str, path: str, replace: bool) -> AdapterStatus:
        """Register the folder ``path`` (inside the adapter folder) under ``name``."""

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for ``name``; free it when its last one ends."""
