"""Section ``decode``: the time of a decode step compared with its roofline, by sequences and adapters."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median

import torch

from adapters.base import Quantization
from adapters.registry import Version
from server.bench.gpu_check.bases import SHAPES_BY_SIZE, bytes_of, random_base, weights_of, why_not
from server.bench.gpu_check.context import Context
from server.bench.gpu_check.random_adapters import RandomAdapters
from server.bench.gpu_check.rows import Row, Skip, Value
from server.bench.gpu_check.served import Driver, Sizes, fallbacks_of, hold, make_prompt, served
from server.bench.roofline import WEIGHT_BYTES, Step, Work, floor, llama_stack, works
from server.engine.build import Parts

RANK = 16
_MIXED = (8, 16, 64, 16, 4, 32, 16, 128)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        sequences, adapters: the most important numbers come first, because time may run out.
        context: the tokens of each prompt.
        warm: the steps before the timed ones.
    """

    shape: str
    quantization: Quantization
    sequences: Sequence[int]
    adapters: Sequence[int]
    context: int = 256
    warm: int = 4
    steps: int = 32

    @property
    def longest(self) -> int:
        """The tokens a sequence may reach: the first ones decode while the last prompts are computed."""
        return self.context + self.warm + self.steps + 32


_SMALL = Plan("tiny", "none", (4, 1), (4, 0), context=16, warm=1, steps=4)


def plan_for(context: Context) -> Plan:
    """The largest base that fits this device, in NF4 if bitsandbytes is installed."""
    if context.gpu is None:
        return _SMALL
    free = torch.cuda.mem_get_info()[0]
    for shape in ("llama-8b", "llama-1b", "tiny"):
        for quantization in ("nf4", "none"):
            most = _most_adapters(shape, free - bytes_of(shape, quantization))
            if why_not(quantization) is None and most >= 64:
                counts = [n for n in (64, 0, 1, 256, 8) if n <= most]
                return Plan(shape, quantization, (64, 1, 8, 32, 128), counts)
    raise Skip("too little memory for any base with 64 adapters")


def _most_adapters(shape: str, free: float) -> int:
    """How many adapters of rank 16 fit beside the keys and values of 128 sequences."""
    stack = llama_stack(SHAPES_BY_SIZE[shape])
    kv = 2 * stack.kv_width * 128 * 600
    return int((0.85 * free - kv) / (2 * RANK * stack.row_width))


def run(context: Context) -> Iterator[Row]:
    """One row for each number of adapters and of sequences. The row of mixed ranks comes last."""
    context.check_time(10.0 if context.gpu else 0.0)
    plan = plan_for(context)
    base = random_base(plan.shape, plan.quantization, context.device)
    adapters = RandomAdapters(base.layout.sites, max(_MIXED))
    most, longest = max(plan.adapters), max(plan.sequences)
    rows = max(most, sum(_MIXED) // RANK * 2)
    sizes = Sizes(longest, longest * plan.longest, rows, max(_MIXED))
    began = time.perf_counter()
    with served(base, sizes, context.scratch, adapters.load) as parts:
        yield _setting(plan, parts, time.perf_counter() - began)
        versions = [adapters.version(number, RANK) for number in range(most)]
        for count in plan.adapters:
            with _resident(parts, versions[:count]):
                for sequences in plan.sequences:
                    context.check_time(2.0)
                    yield _row(context, plan, parts, sequences, versions[:count])
        mixed = [adapters.version(most + i, rank) for i, rank in enumerate(_MIXED)]
        with _resident(parts, mixed):
            yield _row(context, plan, parts, plan.sequences[0], mixed, table="mixed ranks")


def _setting(plan: Plan, parts: Parts, seconds: float) -> Row:
    names = {"model": parts.model.name, "attention": parts.model.attention_name}
    base = {"base": plan.shape, "weights": plan.quantization}
    return Row(
        "what is measured",
        {**base, **names, "context": plan.context, "built in s": round(seconds, 1)},
        fallbacks_of(parts),
    )


def _resident(parts: Parts, versions: Sequence[Version]) -> ExitStack:
    """Pin the adapters until the end of the block, so that all are on the device while some are used."""
    hold(parts, versions)
    pins = ExitStack()
    for version in versions:
        while parts.residency.pin(version) is None:
            time.sleep(0.0005)
        pins.callback(parts.residency.unpin, version.digest)
    return pins


def _row(
    context: Context,
    plan: Plan,
    parts: Parts,
    sequences: int,
    versions: Sequence[Version],
    table: str = "decode",
) -> Row:
    used = _spread(versions, sequences)
    seconds = _measure(plan, parts, sequences, used)
    took = mean(seconds)
    values: dict[str, Value] = {
        "base": plan.shape,
        "weights": plan.quantization,
        "sequences": sequences,
        "adapters": len(versions),
        "distinct in a step": len({version.digest for version in used}),
        "tokens/s": round(sequences / took, 1),
        "step ms": round(took * 1e3, 3),
        "median ms": round(median(seconds) * 1e3, 3),
        "worst ms": round(max(seconds) * 1e3, 3),
    }
    if context.gpu is not None:
        least = floor(_works(plan, sequences, used), context.gpu.machine)
        values |= {"floor ms": round(least * 1e3, 3), "times the floor": round(took / least, 2)}
    return Row(table, values)


def _spread(versions: Sequence[Version], sequences: int) -> list[Version]:
    """The adapter of each sequence, spread over all adapters if there are more adapters than sequences."""
    if not versions:
        return []
    stride = max(len(versions) // sequences, 1)
    return [versions[i * stride % len(versions)] for i in range(sequences)]


def _works(plan: Plan, sequences: int, used: Sequence[Version]) -> dict[str, Work]:
    ranks = {version.digest: version.info.rank for version in used}
    step = Step(
        sequences=sequences,
        context=plan.context + plan.warm + plan.steps / 2,
        read_ranks=sum(ranks.values()),
        used_ranks=sum(version.info.rank for version in used),
    )
    return works(llama_stack(SHAPES_BY_SIZE[plan.shape]), step, WEIGHT_BYTES[weights_of(plan.quantization)])


def _measure(plan: Plan, parts: Parts, sequences: int, used: Sequence[Version]) -> list[float]:
    """The seconds of each decode step. The steps run without a pause between them."""
    driver, vocabulary = Driver(parts), SHAPES_BY_SIZE[plan.shape]["vocab_size"]
    for i in range(sequences):
        prompt = make_prompt(i, plan.context, vocabulary)
        driver.ask(str(i), prompt, used[i] if used else None, plan.longest - plan.context)
    while parts.engine.scheduler.num_decoding < sequences:
        driver.step()
    for _ in range(plan.warm):
        driver.step()
    seconds = [_timed_step(driver) for _ in range(plan.steps)]
    assert parts.engine.scheduler.num_decoding == sequences, "a sequence ended too early"
    driver.give_up()
    return seconds


def _timed_step(driver: Driver) -> float:
    began = time.perf_counter()
    driver.step()
    return time.perf_counter() - began
