"""The engine's interface: requests, generations, status and the ``Service``. No torch, no HTTP.

``Service.submit`` takes a ``GenerationRequest`` and returns a ``Generation``, an asynchronous iterator of
``Delta``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from server.engine.sampling_params import SamplingDefaults, SamplingParams

if TYPE_CHECKING:
    from adapters.registry import Version

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to the engine.

    Attributes:
        request_id: unique; the logs use it too.
        prompt: token ids, at least one.
        adapter: the adapter's registered name; None = the base itself.
        sampling: see ``SamplingParams``.
        version: the adapter version that ``Service.holding`` gave. A prompt rendered for a version is
            answered by that version only. None = the current version.
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
        token_ids: the tokens generated since the last delta.
        logprobs: one for each token in ``token_ids``; None if the request did not ask for them.
        finish_reason: set on an answer's last delta only.
        stop_reason: the stop string or stop token that ended the answer, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Generation(Protocol):
    """A running request. Iterate to its end, or call ``cancel``. Raises ``RequestError`` if it fails."""

    @property
    def fingerprint(self) -> str:
        """Identifies base and adapter by digest: ``nf4-<base12>`` or ``nf4-<base12>-lora-<adapter12>``."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache; known from the first delta on."""

    @property
    def queue_seconds(self) -> float | None:
        """Seconds from submission until the first step that computed part of it; None while it waits."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """Stop at once and free everything. Does nothing if the request has ended."""


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One registered (or refused) adapter, for ``GET /v1/adapters`` and metrics.

    Attributes:
        state: ``ready``, ``draining`` (unloaded, requests still running), ``waiting`` (its files are not
            complete, or not read yet) or ``failed``.
        tier: where its weights are now: ``device``, ``host`` or ``disk``.
        rank: the largest rank of any of its modules.
        nbytes: bytes of its weights as served.
        last_used: UNIX seconds, or None.
        reason: why it failed, or what it is waiting for; None otherwise.
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
    """A snapshot of the engine for ``/metrics`` and ``/health``. Counters never decrease."""

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
    """The base model as clients see it.

    Attributes:
        attention: the name of the attention backend.
        takes_reasoning: whether its chat template renders an assistant's reasoning.
        defaults: sampling defaults for requests that leave fields out.
        weight_bytes: bytes of the weights, by how they are stored: ``nf4`` (with scales), ``bf16``, and
            ``bf16_experts``, which is a part of ``bf16``.
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
    weight_bytes: Mapping[str, int] = field(default_factory=dict)


class Service(Protocol):
    """What HTTP needs of the engine. ``server/engine/service.py`` implements it; tests have a fake.

    Coroutines run on the event loop and never block it. They raise ``RequestError`` and ``AdapterError``.
    """

    @property
    def base(self) -> ModelInfo: ...

    def stats(self) -> EngineStats: ...

    def failure(self) -> str | None:
        """Why the engine's loop ended, or None while it runs."""

    def draining(self) -> bool: ...

    async def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds."""

    def holding(self, adapter: str | None) -> AbstractContextManager[Version | None]:
        """Hold the current version of an adapter; None = the base. Raises ``AdapterError``."""

    async def render_chat(self, messages: list[dict[str, str]], version: Version | None = None) -> list[int]:
        """Token ids of a conversation, rendered with the version's chat template, or the base's."""

    async def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request. Raises at once for what is known at once: an unknown adapter, a full queue."""

    def adapters(self) -> list[AdapterStatus]: ...

    def adapter(self, name: str) -> AdapterStatus | None:
        """The adapter of that name; one that is draining only if there is no other. Never slow."""

    def adapter_names(self) -> list[str]:
        """The names that requests may use, in no order."""

    def has_adapter(self, name: str) -> bool: ...

    async def find_adapter(self, name: str) -> bool:
        """As ``has_adapter``, but first checks the folder of an unknown name, which may be new."""

    async def load_adapter(self, name: str, path: str, replace: bool) -> AdapterStatus:
        """Register the folder ``path`` (inside the adapter folder) under ``name``."""

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for ``name``, and free it when its last request ends."""
