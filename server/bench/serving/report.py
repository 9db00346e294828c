"""Reports a measurement as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.serving.compare import Measured
from server.bench.serving.stats import STATISTICS, median
from server.bench.serving.sweep import Sweep
from server.bench.table import align, number

_LABELS = {
    "duration": "duration, s",
    "completed": "requests completed",
    "failed": "requests failed",
    "total_input_tokens": "prompt tokens",
    "total_cached_tokens": "of them from a prefix cache",
    "total_output_tokens": "output tokens",
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "total tokens/s",
    "prefill_throughput": "prefill tokens/s",
    "decode_throughput": "decode tokens/s",
    "peak_memory_mib": "peak memory, MiB",
    "memory_mib": "memory after the run, MiB",
    "generator_cpu_share": "load generator, cores",
} | {
    f"{statistic}_{name}_ms": f"{label} {statistic}, ms"
    for name, label in {
        "ttft": "time to first token",
        "itl": "inter-token latency",
        "tpot": "time per output token",
        "e2el": "end-to-end latency",
    }.items()
    for statistic in STATISTICS
}

# Figures that the load or the measurement sets, so their ratios mean nothing.
_WITHOUT_RATIO = {
    "completed",
    "failed",
    "total_input_tokens",
    "total_cached_tokens",
    "total_output_tokens",
    "generator_cpu_share",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        shown = number(self.median)
        return shown if self.min == self.max else f"{shown} ({number(self.min)} to {number(self.max)})"


def spreads(measured: Measured) -> dict[str, Spread]:
    """Every figure that all runs have."""
    shared = [name for name in _LABELS if all(name in run for run in measured.runs)]
    return {name: Spread.of([run[name] for run in measured.runs]) for name in shared}


def ratios(ours: Measured, theirs: Measured) -> dict[str, Spread]:
    """Ours divided by theirs, run by run. Each pair had the same workload, one right after the other."""
    divisors = {name for name, spread in spreads(theirs).items() if spread.min > 0} - _WITHOUT_RATIO
    shared = [name for name in spreads(ours) if name in divisors]
    return {
        name: Spread.of([a[name] / b[name] for a, b in zip(ours.runs, theirs.runs, strict=True)])
        for name in shared
    }


def table(measured: Sequence[Measured]) -> str:
    """One row for each figure: the first runner's, then each peer's and the ratio of the first to it."""
    ours, *peers = measured
    columns: list[tuple[str, dict[str, Spread]]] = [(ours.name, spreads(ours))]
    for one in peers:
        columns += [(one.name, spreads(one)), (f"{ours.name}/{one.name}", ratios(ours, one))]
    names = [name for name in _LABELS if any(name in figures for _, figures in columns)]
    rows = [["median (min to max)", *(title for title, _ in columns)]]
    rows += [[_LABELS[name], *(str(figures.get(name, "")) for _, figures in columns)] for name in names]
    return align(rows)


def errors(measured: Sequence[Measured]) -> list[str]:
    """One line for each kind of error, the most frequent first."""
    return [
        f"{one.name}: {count} times {error}"
        for one in measured
        for error, count in Counter(one.errors).most_common()
    ]


def document(config: dict[str, Any], machine: dict[str, Any], measured: Sequence[Measured]) -> dict[str, Any]:
    """Everything as JSON values: the command, the machine, each run's figures, medians and ratios."""
    return _head(config, machine) | _comparison(measured)


def sweep_document(config: dict[str, Any], machine: dict[str, Any], sweep: Sweep) -> dict[str, Any]:
    """The same for a sweep: its axis, and a comparison at each of its points."""
    points = [{"at": point.at, **_comparison(point.measured)} for point in sweep.points]
    head = _head(config, machine) | {"axis": sweep.axis.label, "saturation": sweep.saturation}
    return head | {"points": points}


def sweep_table(sweep: Sweep) -> str:
    """One row for each point and server: the axis' figures, and the first server's ratio in the first one."""
    first, *_ = sweep.axis.figures
    ours = sweep.points[0].measured[0].name
    titles = [_LABELS[name] for name in sweep.axis.figures]
    rows = [[sweep.axis.label, "server", *titles, f"{ours}/it, {_LABELS[first]}"]]
    for point in sweep.points:
        for one in point.measured:
            figures = spreads(one)
            cells = [str(figures.get(name, "")) for name in sweep.axis.figures]
            ratio = "" if one is point.measured[0] else str(ratios(point.measured[0], one).get(first, ""))
            rows.append([number(point.at), one.name, *cells, ratio])
    return align(rows)


def _head(config: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": {key: str(value) if value == math.inf else value for key, value in config.items()},
        "machine": machine,
    }


def _comparison(measured: Sequence[Measured]) -> dict[str, Any]:
    ours, *peers = measured
    return {
        "servers": [
            {"name": one.name, "runs": one.runs, "errors": one.errors, "median": _medians(spreads(one))}
            for one in measured
        ],
        "ratios": {
            one.name: {name: _spread(spread) for name, spread in ratios(ours, one).items()} for one in peers
        },
    }


def _medians(figures: dict[str, Spread]) -> dict[str, float]:
    return {name: spread.median for name, spread in figures.items()}


def _spread(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "min": spread.min, "max": spread.max}
