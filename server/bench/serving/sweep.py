"""A measurement at several points of one axis: the number of adapters, or the rate of requests.

All servers run during the whole sweep. Every run of every point has prompts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from server.bench.errors import BenchError
from server.bench.peers import Runner, Setup
from server.bench.serving.compare import Measured, measure, say
from server.bench.serving.stats import median
from server.bench.serving.workload import Load

Kind = Literal["adapters", "rate", "share"]


@dataclass(frozen=True, slots=True)
class Axis:
    """The quantity that varies, its label with the unit, and the figures that are shown."""

    kind: Kind
    label: str
    figures: tuple[str, ...]


_LATENCIES = ("p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms")
ADAPTERS = Axis(
    "adapters", "distinct adapters", ("output_throughput", "decode_throughput", "peak_memory_mib")
)
RATE = Axis("rate", "requests/s", _LATENCIES)
SHARE = Axis("share", "load, % of each server's own saturation", _LATENCIES)


@dataclass(frozen=True, slots=True)
class Point:
    at: float
    measured: list[Measured]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of an axis.

    Attributes:
        saturation: by server, the most requests/s that it sustains, if the axis is a share of it.
    """

    axis: Axis
    points: list[Point]
    saturation: dict[str, float] = field(default_factory=dict)


def sweep_adapters(
    runners: Sequence[Runner], setup: Setup, load: Load, counts: Sequence[float], repeats: int
) -> Sweep:
    """The same load on the first adapters, for each number of them in ``counts``.

    Raises:
        BenchError: there are fewer adapters or requests than the largest count.
    """
    most = int(max(counts))
    if most > min(len(setup.adapters), load.num_prompts):
        raise BenchError(
            f"{most} distinct adapters need as many adapters and requests, but there are "
            f"{len(setup.adapters)} adapters and {load.num_prompts} requests; "
            "raise --num-adapters and --num-prompts"
        )
    loads = [[replace(load, num_adapters=int(count))] * len(runners) for count in counts]
    return Sweep(ADAPTERS, _points(runners, setup, counts, loads, repeats, first_run=1))


def sweep_rates(
    runners: Sequence[Runner], setup: Setup, load: Load, rates: Sequence[float], repeats: int
) -> Sweep:
    """The same requests at each of ``rates``, in requests/s."""
    loads = [[replace(load, request_rate=rate)] * len(runners) for rate in rates]
    return Sweep(RATE, _points(runners, setup, rates, loads, repeats, first_run=1))


def sweep_shares(
    runners: Sequence[Runner], setup: Setup, load: Load, shares: Sequence[float], repeats: int
) -> Sweep:
    """The same requests at ``shares``, in percent of the most requests/s that each server sustains.

    That is its requests/s when all are sent at once: the median of as many runs as a point has.

    Raises:
        BenchError: a server answered no request.
    """
    bursts = measure(runners, setup, [replace(load, request_rate=math.inf)] * len(runners), repeats)
    most = [_requests_per_second(burst) for burst in bursts]
    loads = [[replace(load, request_rate=share / 100 * rate) for rate in most] for share in shares]
    points = _points(runners, setup, shares, loads, repeats, first_run=1 + repeats)
    return Sweep(SHARE, points, {burst.name: rate for burst, rate in zip(bursts, most, strict=True)})


def _requests_per_second(burst: Measured) -> float:
    answered = [run["request_throughput"] for run in burst.runs if "request_throughput" in run]
    if not answered:
        raise BenchError(f"{burst.name} answered no request, so its saturation is unknown: {burst.errors[0]}")
    return median(answered)


def _points(
    runners: Sequence[Runner],
    setup: Setup,
    values: Sequence[float],
    loads: Sequence[Sequence[Load]],
    repeats: int,
    first_run: int,
) -> list[Point]:
    points = []
    for index, (value, each) in enumerate(zip(values, loads, strict=True)):
        say(f"point {index + 1} of {len(values)}: {value:g}")
        points.append(Point(value, measure(runners, setup, each, repeats, first_run + index * repeats)))
    return points
