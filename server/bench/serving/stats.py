"""Computes the figures of a run from the records of its requests. Only arithmetic; times are in seconds.

Times are counted from the run's start. While requests are in flight, each moment belongs to one of two:

* **prefill time**: at least one of them has not received its first token yet;
* **decode time**: all of them have received their first token.

``prefill_throughput`` and ``decode_throughput`` are defined by these two, from what the client sees. So they
mean the same for every server, whatever its scheduling:

* ``prefill_throughput`` = prompt tokens that were computed (not found in a prefix cache) / prefill time.
  Decoding during prefill time lowers it.
* ``decode_throughput`` = tokens received in decode time, without first tokens / decode time. A server that
  decoded some requests during prefill time has fewer sequences to decode later, which lowers it.

Both are meant for bursts, where all requests are sent at once. With steady arrivals, some request is nearly
always in prefill. Use ``output_throughput`` and the latencies then.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The record of one call.

    Attributes:
        sent: when the request was sent, after any wait for the concurrency bound.
        chunks: when each chunk with tokens arrived.
        prompt_tokens, cached_tokens, output_tokens: from the server's ``usage``.
        error: why it failed, or None.
    """

    sent: float
    chunks: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        return self.chunks[0]

    @property
    def last(self) -> float:
        return self.chunks[-1]


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run of a workload.

    Attributes:
        records: one per call, in the calls' order.
        generator_cpu: CPU seconds that the load generator took; 0 if none was used.
    """

    records: tuple[CallRecord, ...]
    generator_cpu: float = 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile, interpolated linearly between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Iterable[float]) -> float:
    return percentile(list(values), 50)


def summarise(result: RunResult) -> Metrics:
    """The figures of one run. Those that ``vllm bench serve`` has too are named as there.

    Latencies are in milliseconds, ``duration`` in seconds. A figure is absent if the run does not define it,
    for example if there are no answers or only answers of one token.
    """
    good = [record for record in result.records if record.error is None]
    metrics: Metrics = {"completed": len(good), "failed": len(result.records) - len(good)}
    if good:
        metrics |= _throughputs(good)
        metrics |= _latencies(good)
        metrics["generator_cpu_share"] = result.generator_cpu / metrics["duration"]
    return metrics


def _throughputs(records: Sequence[CallRecord]) -> Metrics:
    duration = max(record.last for record in records) - min(record.sent for record in records)
    prompt = sum(record.prompt_tokens for record in records)
    cached = sum(record.cached_tokens for record in records)
    output = sum(record.output_tokens for record in records)
    metrics: Metrics = {
        "duration": duration,
        "total_input_tokens": prompt,
        "total_cached_tokens": cached,
        "total_output_tokens": output,
        "request_throughput": len(records) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "prefill_throughput": (prompt - cached) / total_length(prefill_time(records)),
    }
    decode = total_length(decode_time(records))
    if decode > 0:
        metrics["decode_throughput"] = _tokens_within(records, decode_time(records)) / decode
    return metrics


def _latencies(records: Sequence[CallRecord]) -> Metrics:
    several = [record for record in records if record.output_tokens > 1]
    samples = {
        "ttft": [record.first - record.sent for record in records],
        "tpot": [(record.last - record.first) / (record.output_tokens - 1) for record in several],
        "itl": [gap for record in records for gap in gaps(record)],
        "e2el": [record.last - record.sent for record in records],
    }
    return {
        f"{statistic}_{name}_ms": 1000 * take(values)
        for name, values in samples.items()
        if values
        for statistic, take in STATISTICS.items()
    }


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "p50": lambda values: percentile(values, 50),
    "p90": lambda values: percentile(values, 90),
    "p99": lambda values: percentile(values, 99),
}


def gaps(record: CallRecord) -> list[float]:
    """Seconds between successive chunks."""
    return [later - earlier for earlier, later in itertools.pairwise(record.chunks)]


# Spans: sorted, disjoint (begin, end) pairs.
Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same moments as sorted, disjoint spans."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def subtract(spans: Spans, others: Spans) -> Spans:
    """The moments of ``spans`` that are not in ``others``."""
    left: Spans = []
    for begin, end in spans:
        done = begin
        for other_begin, other_end in others:
            if other_end <= done or other_begin >= end:
                continue
            if done < other_begin:
                left.append((done, other_begin))
            done = other_end
        if done < end:
            left.append((done, end))
    return left


def total_length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def prefill_time(records: Sequence[CallRecord]) -> Spans:
    """When at least one request waits for its first token."""
    return union((record.sent, record.first) for record in records)


def decode_time(records: Sequence[CallRecord]) -> Spans:
    """When requests are in flight and all of them have their first token."""
    return subtract(union((record.sent, record.last) for record in records), prefill_time(records))


def _tokens_within(records: Sequence[CallRecord], spans: Spans) -> float:
    """Tokens after the first that arrive within ``spans``.

    A chunk may hold several tokens, and only their sum is known: each chunk after the first stands for an
    equal share.
    """
    tokens = 0.0
    begins = [begin for begin, _ in spans]
    for record in records:
        inside = sum(_is_within(time, spans, begins) for time in record.chunks[1:])
        if inside:
            tokens += inside * (record.output_tokens - 1) / (len(record.chunks) - 1)
    return tokens


def _is_within(time: float, spans: Spans, begins: list[float]) -> bool:
    place = bisect.bisect_left(begins, time) - 1
    return place >= 0 and time <= spans[place][1]
