from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.serving.stats import (
    CallRecord,
    RunResult,
    Spans,
    decode_time,
    percentile,
    prefill_time,
    subtract,
    summarise,
    total_length,
    union,
)

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)
SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda span: (span[0], span[0] + span[1])),
    max_size=8,
)


@given(VALUES, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def moments(spans: Spans) -> set[int]:
    """Integer spans as the unit intervals that they cover."""
    return {moment for begin, end in spans for moment in range(int(begin), int(end))}


@given(SPANS, SPANS)
def test_spans_are_sets_of_moments(a: Spans, b: Spans) -> None:
    assert moments(union(a)) == moments(a)
    left = subtract(union(a), union(b))
    assert moments(left) == moments(a) - moments(b)
    assert total_length(left) == len(moments(left))
    assert left == sorted(left)


# Two concurrent requests. The first decodes at 3, while the second waits until 4, and the first ends first.
FIRST = CallRecord(sent=0, chunks=(2, 3, 5, 6), prompt_tokens=10, cached_tokens=4, output_tokens=4)
SECOND = CallRecord(sent=0, chunks=(4, 5, 6, 7), prompt_tokens=20, output_tokens=4)


def test_prefill_and_decode_time_make_up_the_run() -> None:
    assert prefill_time([FIRST, SECOND]) == [(0, 4)]
    assert decode_time([FIRST, SECOND]) == [(4, 7)]
    late = CallRecord(sent=5, chunks=(6,))
    assert prefill_time([FIRST, SECOND, late]) == [(0, 4), (5, 6)]
    assert decode_time([FIRST, SECOND, late]) == [(4, 5), (6, 7)]


def test_the_figures_of_a_run() -> None:
    failed = CallRecord(sent=0, chunks=(), error="HTTP 500")
    metrics = summarise(RunResult((FIRST, SECOND, failed), generator_cpu=0.7))
    expected = {
        "completed": 2,
        "failed": 1,
        "duration": 7,
        "total_input_tokens": 30,
        "total_cached_tokens": 4,
        "total_output_tokens": 8,
        "request_throughput": 2 / 7,
        "output_throughput": 8 / 7,
        "total_token_throughput": 38 / 7,
        "prefill_throughput": 26 / 4,
        "decode_throughput": 5 / 3,
        "mean_ttft_ms": 3000,
        "mean_tpot_ms": 1000 * (4 / 3 + 1) / 2,
        "mean_itl_ms": 1000 * 7 / 6,
        "p50_itl_ms": 1000,
        "p99_e2el_ms": 6990,
        "generator_cpu_share": 0.1,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_chunks_of_several_tokens_count_with_their_tokens() -> None:
    record = CallRecord(sent=0, chunks=(1, 2, 3), prompt_tokens=1, output_tokens=9)
    assert summarise(RunResult((record,)))["decode_throughput"] == 4


def test_figures_that_a_run_lacks_are_absent() -> None:
    assert summarise(RunResult((CallRecord(0, (), error="refused"),))) == {"completed": 0, "failed": 1}
    single = summarise(RunResult((CallRecord(0, (1,), prompt_tokens=3, output_tokens=1),)))
    assert single["prefill_throughput"] == 3
    assert not {"decode_throughput", "mean_itl_ms", "mean_tpot_ms"} & single.keys()
