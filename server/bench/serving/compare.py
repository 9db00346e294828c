"""Runs a measurement: starts all servers, warms them up, runs them in turn (A B A B …), stops them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from server.bench.memory import memory_of
from server.bench.peers import Runner, Setup
from server.bench.serving.stats import Metrics, RunResult, summarise
from server.bench.serving.workload import Load, make_workload

# Enough tokens to use an adapter, and few enough for hundreds of adapters.
_TOUCH_INPUT_LEN = 8
_TOUCH_OUTPUT_LEN = 2
# OpenMP's threads spin for about 200 ms after their work. The next server's run starts after that.
_SETTLE_S = 0.3


@dataclass(slots=True)
class Measured:
    """All runs of one runner, in order."""

    name: str
    runs: list[Metrics] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, result: RunResult, memory: Metrics) -> None:
        self.runs.append(summarise(result) | memory)
        self.errors += [record.error for record in result.records if record.error]


@contextmanager
def started(runners: Sequence[Runner], setup: Setup) -> Iterator[None]:
    """Start all runners; stop them at the end, in any case.

    Raises:
        BenchError: one did not start.
    """
    with ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.stop)
            say(f"{runner.name}: starting")
            runner.start(setup)
        yield


def warm_up(runners: Sequence[Runner], setup: Setup, load: Load, num_warmups: int) -> None:
    """Ask every adapter once, so that each server has loaded it. Then send ``num_warmups`` requests.

    No figure includes these requests.
    """
    if setup.adapters and load.popularity != "base":
        _play(runners, setup, [touching(load, len(setup.adapters))] * len(runners), run=-1)
    if num_warmups:
        _play(runners, setup, [replace(load, num_prompts=num_warmups)] * len(runners), run=0)


def touching(load: Load, count: int) -> Load:
    """A short request for each of ``count`` adapters, with the concurrency of ``load``."""
    return replace(
        load,
        num_prompts=count,
        input_len=min(load.input_len, _TOUCH_INPUT_LEN),
        output_len=min(load.output_len, _TOUCH_OUTPUT_LEN),
        popularity="distinct",
        num_adapters=None,
        request_rate=math.inf,
        max_concurrency=load.max_concurrency or load.num_prompts,
    )


def measure(
    runners: Sequence[Runner], setup: Setup, loads: Sequence[Load], repeats: int, first_run: int = 1
) -> list[Measured]:
    """Measure every runner under its load. Runners with equal loads get the same workloads.

    Runs alternate between the runners, so that a machine that becomes slower is slower for all of them.
    Runs are numbered from ``first_run``. Each number has prompts of its own.

    Raises:
        BenchError: a runner has ended.
    """
    measured = [Measured(runner.name) for runner in runners]
    for run in range(first_run, first_run + repeats):
        results = _play(runners, setup, loads, run)
        for runner, one, result in zip(runners, measured, results, strict=True):
            one.add(result, memory_of(runner.pid) if runner.pid else {})
    return measured


def _play(runners: Sequence[Runner], setup: Setup, loads: Sequence[Load], run: int) -> list[RunResult]:
    results = []
    for runner, load in zip(runners, loads, strict=True):
        results.append(runner.run(make_workload(load, tuple(setup.adapters), run)))
        if len(runners) > 1:
            time.sleep(_SETTLE_S)
        say(f"{runner.name}: {f'run {run}' if run > 0 else 'warm-up'}: {_in_short(results[-1])}")
    return results


def _in_short(result: RunResult) -> str:
    metrics = summarise(result)
    speed = f"{metrics['output_throughput']:.1f} output tokens/s" if metrics["completed"] else "no answer"
    return f"{speed}, {metrics['failed']:.0f} failed"


def say(line: str) -> None:
    """Print progress on stderr."""
    print(line, file=sys.stderr, flush=True)
