"""The order of a measurement: start everything, warm up, run in turn (A B A B …), stop everything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from server.bench.peers import Runner, Setup
from server.bench.stats import Metrics, RunResult, summarise
from server.bench.workload import Load, make_workload


@dataclass(slots=True)
class Measured:
    """All runs of one runner, in order."""

    name: str
    runs: list[Metrics] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, result: RunResult) -> None:
        self.runs.append(summarise(result))
        self.errors += [record.error for record in result.records if record.error]


def measure(
    runners: Sequence[Runner], setup: Setup, load: Load, repeats: int, num_warmups: int
) -> list[Measured]:
    """Measure every runner under the same workloads.

    Runs alternate between the runners, so that a machine that grows slower is slower for all of them.
    Run 0 is the warm-up of ``num_warmups`` requests, which no figure includes.

    Raises:
        BenchError: one did not start, or ended.
    """
    with ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.stop)
            _say(f"{runner.name}: starting")
            runner.start(setup)
        if num_warmups:
            _run_all(runners, setup, replace(load, num_prompts=num_warmups), run=0)
        measured = [Measured(runner.name) for runner in runners]
        for run in range(1, repeats + 1):
            for one, result in zip(measured, _run_all(runners, setup, load, run), strict=True):
                one.add(result)
    return measured


def _run_all(runners: Sequence[Runner], setup: Setup, load: Load, run: int) -> list[RunResult]:
    workload = make_workload(load, tuple(setup.adapters), run)
    results = []
    for runner in runners:
        results.append(runner.run(workload))
        _say(f"{runner.name}: {f'run {run}' if run else 'warm-up'}: {_in_short(results[-1])}")
    return results


def _in_short(result: RunResult) -> str:
    metrics = summarise(result)
    speed = f"{metrics['output_throughput']:.1f} output tokens/s" if metrics["completed"] else "no answer"
    return f"{speed}, {metrics['failed']:.0f} failed"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
