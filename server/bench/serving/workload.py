"""The requests of a run: which prompts, to which adapters, and when. Made from a seed; no clock, no I/O."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from server.bench.errors import BenchError

Popularity = Literal["distinct", "uniform", "zipf", "identical", "base"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)

# Nearly every tokenizer has these words as one token, so a chat prompt has about the right length. The server
# reports the exact length.
_WORDS = """
the time people way water day part place year work back life house world school number night point home hand
high side case group head problem fact line light name book food land game power
""".split()  # noqa: SIM905 (a list of quoted words is harder to read)


@dataclass(frozen=True, slots=True)
class Load:
    """The shape of a load.

    Attributes:
        num_prompts: requests in one run.
        input_len, output_len: tokens of every prompt and of every answer.
        popularity: how requests are spread over adapters (``choose_adapters``).
        num_adapters: use only the first of the adapters, this many; None = all.
        request_rate: mean requests per second of a Poisson process; infinity sends all at once.
        max_concurrency: most requests in flight; None = no bound.
        token_range: prompts have random token ids in [low, high).
        seed: determines everything random.
    """

    num_prompts: int = 16
    input_len: int = 200
    output_len: int = 64
    popularity: Popularity = "distinct"
    num_adapters: int | None = None
    request_rate: float = math.inf
    max_concurrency: int | None = None
    token_range: tuple[int, int] = (1000, 30000)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One request. ``adapter`` None means the base; ``due`` is in seconds after the run's start."""

    adapter: str | None
    prompt: tuple[int, ...]
    max_tokens: int
    due: float = 0.0

    @property
    def text(self) -> str:
        """One common word for each token of the prompt, for endpoints that take no token ids."""
        return " ".join(_WORDS[token % len(_WORDS)] for token in self.prompt)


@dataclass(frozen=True, slots=True)
class Workload:
    """The calls of one run, in order of ``due``."""

    calls: tuple[Call, ...]
    max_concurrency: int | None = None


def make_workload(load: Load, adapters: Sequence[str], run: int) -> Workload:
    """The workload of run number ``run``.

    Every run has prompts of its own, so that no run finds prompts of another run in a prefix cache.
    """
    rng = random.Random(f"prompts {load.seed} {run}")
    token_ids = range(*load.token_range)
    chosen = choose_adapters(
        load.popularity,
        load.num_prompts,
        adapters[: load.num_adapters],
        random.Random(f"adapters {load.seed} {run}"),
    )
    due = arrivals(load.request_rate, load.num_prompts, random.Random(f"arrivals {load.seed} {run}"))
    calls = tuple(
        Call(adapter, tuple(rng.choices(token_ids, k=load.input_len)), load.output_len, at)
        for adapter, at in zip(chosen, due, strict=True)
    )
    return Workload(calls, load.max_concurrency)


def choose_adapters(
    popularity: Popularity, count: int, adapters: Sequence[str], rng: random.Random
) -> list[str | None]:
    """The adapter of each of ``count`` requests; None = the base.

    ``distinct`` takes all adapters in turn. ``uniform`` takes any with equal probability. ``zipf`` takes the
    k-th with a probability proportional to 1/k. ``identical`` takes only the first, ``base`` none.
    """
    if popularity == "base":
        return [None] * count
    if not adapters:
        raise BenchError(
            f"adapter popularity {popularity!r} needs at least one adapter; use 'base' to ask the base"
        )
    match popularity:
        case "distinct":
            return list(itertools.islice(itertools.cycle(adapters), count))
        case "identical":
            return [adapters[0]] * count
        case "uniform":
            return [rng.choice(adapters) for _ in range(count)]
        case "zipf":
            weights = [1 / rank for rank in range(1, len(adapters) + 1)]
            return list(rng.choices(adapters, weights, k=count))


def arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    """``count`` increasing times in seconds: a Poisson process of ``rate`` per second; all 0 for infinity."""
    if math.isinf(rate):
        return [0.0] * count
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))
