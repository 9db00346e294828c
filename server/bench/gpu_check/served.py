"""Builds an engine as ``manylora serve`` does, without HTTP, and runs it step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters.artifact import Adapter
from adapters.base import LoadedBase
from adapters.registry import Version
from server.config import from_args
from server.engine.build import Parts, assemble
from server.engine.engine import Output
from server.engine.interface import GenerationRequest
from server.engine.sampling_params import SamplingParams
from server.engine.sync_engine import SyncEngine

_POLL_S = 0.00005


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of an engine.

    Attributes:
        adapters: how many adapters of rank 16 fit the device.
        tokens: how many tokens the KV cache holds.
        eager: whether to run without CUDA graphs.
    """

    sequences: int
    tokens: int
    adapters: int = 1
    most_rank: int = 16
    host_memory: int = 1 << 28
    eager: bool = False


@contextmanager
def served(
    base: LoadedBase, sizes: Sizes, home: Path, load: Callable[[Version], Adapter] | None = None
) -> Iterator[Parts]:
    """The engine's parts, until the end of the block.

    Adapters come from ``home/adapters``, or from ``load`` if it is given.
    """
    config = base.model.config
    of_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    flags = {
        "--home": home,
        "--adapter-dir": home / "adapters",
        "--max-loras": sizes.adapters,
        "--max-lora-rank": sizes.most_rank,
        "--lora-extra-memory": 0,
        "--lora-host-memory": sizes.host_memory,
        "--max-num-seqs": sizes.sequences,
        # A sequence may leave its last block almost empty. The largest block has 256 tokens.
        "--kv-cache-memory": of_token * (sizes.tokens + 256 * sizes.sequences),
    }
    words = [str(word) for pair in flags.items() for word in pair]
    words += ["--no-enable-prefix-caching", *(["--enforce-eager"] if sizes.eager else [])]
    parts = assemble(from_args(words, environ={}), base, load)
    try:
        yield parts
    finally:
        parts.close()


def fallbacks_of(parts: Parts) -> str:
    """The model's fallbacks; "" = none. A server logs them and runs slower; here they are a failure."""
    return "; ".join(parts.model.fallbacks)


@dataclass(slots=True)
class Answer:
    """Attributes:
    tokens: the sampled tokens.
    margins: each token's log-probability minus that of the next best token.
    asked, first: the time of the request and of its first token, by ``time.perf_counter``.
    """

    asked: float
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    first: float = 0.0


class Driver:
    """Adds requests to an engine and runs its steps."""

    def __init__(self, parts: Parts) -> None:
        self._engine = SyncEngine(parts)
        self.answers: dict[str, Answer] = {}

    def ask(
        self, name: str, prompt: Sequence[int], version: Version | None, tokens: int, margins: bool = False
    ) -> None:
        """Add a greedy request that no token ends."""
        sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True, logprobs=2 if margins else None)
        request = GenerationRequest(name, tuple(prompt), None if version is None else version.name, sampling)
        self.answers[name] = Answer(time.perf_counter())
        self._engine.add(request, version)

    def step(self) -> list[Output]:
        outputs = self._engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error
            answer = self.answers[output.request_id]
            answer.first = answer.first or now
            answer.tokens.append(output.token)
            if output.logprobs is not None:
                best, next_best = output.logprobs.top[:2]
                answer.margins.append(best - next_best)
        return outputs

    def give_up(self) -> None:
        """Abort all requests."""
        for name in self.answers:
            self._engine.abort(name)
        self.finish()

    def finish(self) -> dict[str, Answer]:
        """Run steps until all requests have ended. Returns the answers by request name."""
        while self._engine.busy:
            self.step()
        self._engine.take_ended()
        answers, self.answers = self.answers, {}
        return answers


def make_prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """The token ids of a prompt. Prompts of different numbers start differently."""
    return [(31 * number + 7 * i + 3) % (vocabulary - 8) + 4 for i in range(length)]


def hold(parts: Parts, versions: Sequence[Version]) -> None:
    """Keep versions in the registry that have no name, after the requests that use them end."""
    for version in versions:
        parts.registry.acquire(version)


def bring(parts: Parts, versions: Sequence[Version]) -> list[float]:
    """Load the versions onto the device, one after the other. Returns the seconds of each."""
    return [_bring(parts, version) for version in versions]


def _bring(parts: Parts, version: Version) -> float:
    began = time.perf_counter()
    while parts.residency.pin(version) is None:
        time.sleep(_POLL_S)
    took = time.perf_counter() - began
    parts.residency.unpin(version.digest)
    return took
