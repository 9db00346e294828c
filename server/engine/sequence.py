"""One answer being made: its tokens, its progress, its blocks. Bookkeeping only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.registry import Version
from server.engine.interface import FinishReason
from server.engine.kv_cache import BlockTable
from server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.engine.sampling.logits_processors import LogitBias
    from server.engine.sampling.token_counts import TokenCounts


@dataclass(slots=True)
class Shared:
    """What the answers of one request share.

    Attributes:
        version: the adapter's that all of them are made with; None = the base.
        started: an answer has begun with that version, so that it stays.
        not_before: clock before which admission need not be tried again.
        attempts: how often admission found the adapter's content changed.
        bias: its ``logit_bias`` on the device; None before the first draw.
    """

    version: Version | None = None
    started: bool = False
    not_before: float = 0.0
    attempts: int = 0
    bias: LogitBias | None = None


class Sequence:
    """One answer of one request, from the queue to its last token.

    Attributes:
        request_id, index: which request, and which of its n answers.
        slot: the adapter's slot in the rank pool while pinned; -1 = none.
        tokens: prompt and generated tokens. The last one may be drawn but not read yet: a negative id then
            stands for it (``transfer.resolve``).
        num_prompt: how many of them are the prompt.
        num_computed: how many leading tokens have their KV in the cache, or will have it when the steps
            that are launched have run.
        num_cached: prompt tokens that the prefix cache gave at first admission; None before it.
        num_at_start: how many tokens it had when it last took a place.
        arrival: rank in order of arrival; smaller is older.
        seed: what its draws come from, together with the position.
        table: its KV blocks; None while it has none.
        in_flight: launched steps with a chunk of it that have not landed.
        started: clock at the first step that took it up; None before.
        shared: with the request's other answers: the adapter version above all.
        counts: what its penalties go by; None before the first draw, or without penalties.
    """

    __slots__ = (
        "arrival", "counts", "eos", "in_flight", "index", "num_at_start", "num_cached", "num_computed",
        "num_prompt", "params", "request_id", "seed", "shared", "slot", "started", "table", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: tuple[int, ...],
        adapter: Version | None,
        params: SamplingParams,
        seed: int,
        arrival: int,
        eos: frozenset[int],
        shared: Shared | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.arrival = arrival
        self.eos = eos
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.num_cached: int | None = None
        self.slot = -1
        self.table: BlockTable | None = None
        self.in_flight = 0
        self.started: float | None = None
        self.num_at_start = 0
        self.shared = shared if shared is not None else Shared(adapter)
        self.counts: TokenCounts | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.index

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens still without KV; 1 while decoding, 0 while all depends on a token that is not read yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_since_start(self) -> int:
        """Tokens generated since it last took a place."""
        return len(self.tokens) - self.num_at_start

    @property
    def has_started(self) -> bool:
        """Whether it has had a place; its adapter stays pinned from then on."""
        return self.num_cached is not None

    @property
    def adapter(self) -> Version | None:
        """The adapter version that it asks for; None = the base."""
        return self.shared.version

    @property
    def digest(self) -> str | None:
        return self.adapter.digest if self.adapter else None

    def finish_reason(self, length: int, max_model_len: int) -> FinishReason | None:
        """Why the answer ends with its first ``length`` tokens, or None if it goes on after them."""
        generated = length - self.num_prompt
        if generated >= max(self.params.min_tokens, 1) and self.is_stop_token(self.tokens[length - 1]):
            return "stop"
        return "length" if self.is_full(length, max_model_len) else None

    def is_full(self, length: int, max_model_len: int) -> bool:
        """Whether ``length`` tokens are all it may have, whatever they are."""
        return length - self.num_prompt >= self.params.max_tokens or length >= max_model_len

    def is_stop_token(self, token: int) -> bool:
        if token in self.params.stop_token_ids:
            return True
        return token in self.eos and not self.params.ignore_eos

    @property
    def ends(self) -> set[int]:
        """The tokens that end the answer."""
        return set(self.params.stop_token_ids) | (set() if self.params.ignore_eos else self.eos)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step computes for one sequence: tokens [start, start + length).

    Attributes:
        samples: the chunk ends with the last token there was when it was made, so that a new one is drawn.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.stop == len(self.sequence.tokens))

    @property
    def stop(self) -> int:
        return self.start + self.length
