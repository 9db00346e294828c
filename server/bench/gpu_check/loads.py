"""Section ``loads``: the time to load adapters from disk or host memory, and how long requests wait."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from statistics import median, quantiles

from adapters.registry import Version
from server.bench.gpu_check.bases import SHAPES_BY_SIZE, random_base
from server.bench.gpu_check.context import Context
from server.bench.gpu_check.decode import RANK, plan_for
from server.bench.gpu_check.random_adapters import RandomAdapters
from server.bench.gpu_check.rows import Row
from server.bench.gpu_check.served import Driver, Sizes, bring, make_prompt, served
from server.engine.build import Parts

_IN_FLIGHT = 8
_PROMPT = 128
_TOKENS = 24


def run(context: Context) -> Iterator[Row]:
    """The load time from each tier. Then the time to first token if all adapters fit, and if half fit."""
    context.check_time(10.0 if context.gpu else 0.0)
    plan = plan_for(context)
    fitting, requests = (16, 96) if context.gpu else (3, 8)
    in_flight, prompt = (_IN_FLIGHT, _PROMPT) if context.gpu else (2, 16)
    base = random_base(plan.shape, plan.quantization, context.device)
    adapters = RandomAdapters(base.layout.sites, RANK)
    folders = [context.scratch / "adapters" / f"lora-{number:02d}" for number in range(2 * fitting)]
    for number, folder in enumerate(folders):
        adapters.save(number, RANK, folder, base.layout.name_or_path)
    nbytes = adapters.version(0, RANK).info.nbytes
    sizes = Sizes(in_flight, in_flight * (prompt + _TOKENS), fitting, RANK, host_memory=3 * fitting * nbytes)
    with served(base, sizes, context.scratch) as parts:
        versions = [parts.registry.register(folder.name, folder, replace=True) for folder in folders]
        for tier in ("disk", "host"):
            context.check_time(5.0)
            yield _load_row(tier, nbytes, bring(parts, versions))
        load = _Load(requests, in_flight, prompt, SHAPES_BY_SIZE[plan.shape]["vocab_size"])
        for share, chosen in (("all fit", versions[:fitting]), ("half fit", versions)):
            context.check_time(5.0)
            bring(parts, chosen[:fitting])
            yield _first_token_row(share, load.run(parts, chosen))


def _load_row(tier: str, nbytes: int, seconds: Sequence[float]) -> Row:
    middle = median(seconds)
    return Row(
        "loads",
        {
            "from": tier,
            "MB": round(nbytes / 1e6, 1),
            "median ms": round(middle * 1e3, 2),
            "worst ms": round(max(seconds) * 1e3, 2),
            "GB/s": round(nbytes / middle / 1e9, 2),
        },
    )


def _first_token_row(share: str, seconds: Sequence[float]) -> Row:
    return Row(
        "first tokens",
        {
            "adapters": share,
            "requests": len(seconds),
            "median ms": round(median(seconds) * 1e3, 2),
            "mean ms": round(sum(seconds) / len(seconds) * 1e3, 2),
            "p90 ms": round(quantiles(seconds, n=10)[-1] * 1e3, 2),
        },
    )


class _Load:
    """A number of requests, each under a random adapter, with at most ``in_flight`` at a time."""

    def __init__(self, requests: int, in_flight: int, prompt: int, vocabulary: int) -> None:
        self._requests, self._in_flight = requests, in_flight
        self._prompts = [make_prompt(i, prompt, vocabulary) for i in range(requests)]

    def run(self, parts: Parts, versions: Sequence[Version]) -> list[float]:
        """The seconds from each request to its first token."""
        choice, driver, asked, ended = random.Random(0), Driver(parts), 0, 0
        while ended < self._requests:
            while asked < self._requests and asked - ended < self._in_flight:
                driver.ask(str(asked), self._prompts[asked], choice.choice(versions), _TOKENS)
                asked += 1
            driver.step()
            ended += len(parts.engine.take_ended())
        return [answer.first - answer.asked for answer in driver.finish().values()]
