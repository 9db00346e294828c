"""The state of one answer: its tokens, its progress, its blocks. Integers only, no tensors."""

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
        version: the adapter version that all of them use; None = the base.
        started: whether an answer has started with that version. It cannot change any more then.
        not_before: time before which admission is not tried again.
        attempts: how often admission found that the adapter's content had changed.
        bias: the request's ``logit_bias`` on the device; None before the first token is sampled.
    """

    version: Version | None = None
    started: bool = False
    not_before: float = 0.0
    attempts: int = 0
    bias: LogitBias | None = None


class Sequence:
    """One answer of one request, from the queue to its last token.

    Attributes:
        request_id, index: the request, and which of its n answers this is.
        slot: the adapter's slot in the rank pool while the adapter is pinned; -1 = none.
        tokens: prompt and generated tokens. If the last one has been sampled but not read yet, a negative id
            stands for it (``transfer.resolve``).
        num_prompt: the number of prompt tokens.
        num_computed: the number of leading tokens whose KV is in the cache, or will be when the launched
            steps have run.
        num_cached: prompt tokens found in the prefix cache at first admission; None before it.
        num_at_start: the number of tokens when it last took a running slot.
        arrival: rank in order of arrival; smaller is older.
        seed: seeds its random numbers, together with the token's position.
        table: its KV blocks; None while it has none.
        in_flight: the number of launched steps that compute part of it and have not completed.
        started: time of the first step that computed part of it; None before.
        shared: the state shared with the request's other answers, such as the adapter version.
        counts: token counts for its penalties; None before the first token is sampled, or without penalties.
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
        """Tokens without KV: 1 while decoding, 0 while the next token is not known yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_since_start(self) -> int:
        """Tokens generated since it last took a running slot."""
        return len(self.tokens) - self.num_at_start

    @property
    def has_started(self) -> bool:
        """Whether it has had a running slot. Its adapter stays pinned from then on."""
        return self.num_cached is not None

    @property
    def adapter(self) -> Version | None:
        """The adapter version that it uses; None = the base."""
        return self.shared.version

    @property
    def digest(self) -> str | None:
        return self.adapter.digest if self.adapter else None

    def finish_reason(self, length: int, max_model_len: int) -> FinishReason | None:
        """Why the answer ends after its first ``length`` tokens, or None if it continues."""
        generated = length - self.num_prompt
        if generated >= max(self.params.min_tokens, 1) and self.is_stop_token(self.tokens[length - 1]):
            return "stop"
        return "length" if self.is_full(length, max_model_len) else None

    def is_full(self, length: int, max_model_len: int) -> bool:
        """Whether the answer must end at ``length`` tokens, whatever they are."""
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
        samples: whether the chunk ends with the sequence's last token, so that a new token is sampled.
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
