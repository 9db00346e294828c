from __future__ import annotations

import random
from collections import Counter

import pytest

from server.bench.errors import BenchError
from server.bench.serving.workload import Load, Popularity, arrivals, choose_adapters, make_workload

NAMES = tuple(f"a{index}" for index in range(4))


def choose(popularity: Popularity, count: int) -> Counter[str | None]:
    return Counter(choose_adapters(popularity, count, NAMES, random.Random(0)))


def test_the_seed_gives_the_same_workload_and_each_run_its_own() -> None:
    load = Load(popularity="uniform", request_rate=5, seed=3)
    assert make_workload(load, NAMES, run=1) == make_workload(load, NAMES, run=1)
    prompts = {
        call.prompt
        for run in range(3)
        for seed in (3, 4)
        for call in make_workload(Load(seed=seed), NAMES, run).calls
    }
    assert len(prompts) == 3 * 2 * 16


def test_prompts_have_the_wanted_length_and_range() -> None:
    load = Load(num_prompts=7, input_len=33, output_len=5, token_range=(10, 12))
    calls = make_workload(load, NAMES, run=0).calls
    assert len(calls) == 7
    assert {len(call.prompt) for call in calls} == {33}
    assert {token for call in calls for token in call.prompt} == {10, 11}
    assert {call.max_tokens for call in calls} == {5}
    assert all(len(call.text.split()) == 33 for call in calls)


def test_popularities() -> None:
    assert choose("distinct", 8) == dict.fromkeys(NAMES, 2)
    assert choose("identical", 8) == {"a0": 8}
    assert choose("base", 8) == {None: 8}


@pytest.mark.parametrize(
    ("popularity", "weights"), [("uniform", (1, 1, 1, 1)), ("zipf", (1, 1 / 2, 1 / 3, 1 / 4))]
)
def test_random_popularities_follow_their_law(popularity: Popularity, weights: tuple[float, ...]) -> None:
    count = 10_000
    chosen = choose(popularity, count)
    for name, weight in zip(NAMES, weights, strict=True):
        assert chosen[name] == pytest.approx(count * weight / sum(weights), rel=0.1)


def test_a_limit_uses_only_the_first_adapters() -> None:
    calls = make_workload(Load(num_adapters=2), NAMES, run=1).calls
    assert Counter(call.adapter for call in calls) == dict.fromkeys(NAMES[:2], 8)


def test_a_popularity_without_adapters_is_refused() -> None:
    with pytest.raises(BenchError, match="at least one adapter"):
        choose_adapters("zipf", 1, (), random.Random(0))
    assert choose_adapters("base", 1, (), random.Random(0)) == [None]


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(20, 5000, random.Random(0))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5000 / 20, rel=0.05)
    assert arrivals(float("inf"), 3, random.Random(0)) == [0, 0, 0]
