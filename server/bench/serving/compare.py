"""The order of a measurement: start everything, warm up, run in turn (A B A B …), stop everything."""

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

# Long enough to compute with an adapter, short enough for hundreds of them.
_TOUCH_INPUT_LEN = 8
_TOUCH_OUTPUT_LEN = 2
# OpenMP's threads go on spinning for some 200 ms after their work: not into the next server's run.
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
    """All runners up meanwhile, and surely stopped afterwards.

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
    """Ask every adapter once, so that all are where each server keeps them, then play the load.

    The load's part has ``num_warmups`` requests. No figure includes any of it.
    """
    if setup.adapters and load.popularity != "base":
        _play(runners, setup, [touching(load, len(setup.adapters))] * len(runners), run=-1)
    if num_warmups:
        _play(runners, setup, [replace(load, num_prompts=num_warmups)] * len(runners), run=0)


def touching(load: Load, count: int) -> Load:
    """A short request for each of ``count`` adapters, no more of them at once than ``load`` sends."""
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
    """Measure every runner under its load; with equal loads, all get the same workloads.

    Runs alternate between the runners, so that a machine that grows slower is slower for all of them.
    Runs are numbered from ``first_run``; a number stands for prompts that no other run has.

    Raises:
        BenchError: one has ended.
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
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)
