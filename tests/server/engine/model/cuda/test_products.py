"""Which product of NF4 weights is chosen, with invented timings and weights that bitsandbytes packed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from server.engine.model.cuda import product_timing, products
from server.engine.model.cuda.product_timing import choose, choose_by_shape, stopwatch
from server.engine.model.cuda.products import (
    OURS,
    PRODUCTS,
    ROWS,
    USUAL,
    Choice,
    Nf4Weight,
    candidates,
    quickest,
)


class OutOfResources(Exception):
    """Like Triton's error, which is not a RuntimeError."""


def weight(outputs: int = 32, inputs: int = 128, seed: int = 0) -> Nf4Weight:
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    packed, state = quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=False)
    return Nf4Weight(packed, state.absmax, state.code, outputs, inputs, 64, "nf4")


def test_the_usual_product_is_chosen_unless_another_is_clearly_quicker() -> None:
    assert quickest({USUAL: 2.0, "dense": 3.0, OURS: 1.0}) == OURS
    assert quickest({USUAL: 2.0, "dense": 1.0}) == "dense"
    assert quickest({USUAL: 1.0, "dense": 0.98, OURS: 0.99}) == USUAL


def test_rows_between_measured_numbers_use_the_next_larger_one() -> None:
    choice = Choice([OURS if rows <= 64 else "dense" for rows in ROWS])
    assert [choice.of(rows) for rows in (1, 33, 64)] == [OURS] * 3
    assert [choice.of(rows) for rows in (65, 512)] == ["dense"] * 2
    assert choice.of(513) == USUAL
    assert str(choice) == f"{OURS} to 64 rows, dense to 512"
    assert Choice().of(1) == str(Choice()) == USUAL


def test_products_are_the_same_product() -> None:
    x, bias = torch.randn(3, 128).to(torch.bfloat16), torch.randn(32).to(torch.bfloat16)
    usual, dense = (PRODUCTS[name](weight(), x, bias).float() for name in (USUAL, "dense"))
    torch.testing.assert_close(usual, dense, rtol=0.02, atol=0.02)


def test_our_product_is_used_for_few_rows_of_supported_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    few, many = (candidates(weight(), rows) for rows in (128, 129))
    assert (few, many) == ([USUAL, "dense", OURS], [USUAL, "dense"])
    monkeypatch.setattr(products, "find_spec", {}.get)
    assert candidates(weight(), 1) == [USUAL, "dense"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The (name, rows) of each product that ran. All of them compute the dense product."""
    seen: list[tuple[str, int]] = []

    def noted(name: str) -> Callable[[Nf4Weight, Tensor, Tensor | None], Tensor]:
        def run(of: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
            seen.append((name, len(x)))
            return products.dequantised(of, x, bias)

        return run

    for name in (USUAL, "dense", OURS):
        monkeypatch.setitem(PRODUCTS, name, noted(name))
    monkeypatch.setattr(
        product_timing, "candidates", lambda _, rows: [USUAL, "dense", *([OURS] if rows <= 128 else [])]
    )
    return seen


def by_name(seen: list[tuple[str, int]], taken: dict[str, float]) -> Callable[[Callable[[], Tensor]], float]:
    """A timer that returns the given seconds for each product."""

    def seconds_of(run: Callable[[], Tensor]) -> float:
        run()
        return taken[seen[-1][0]]

    return seconds_of


def test_each_shape_is_measured_by_itself(
    ran: list[tuple[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    weights = [weight(), weight(64), weight(seed=1)]
    with caplog.at_level(logging.INFO, "manylora.engine"):
        choices = choose_by_shape(weights, by_name(ran, {USUAL: 3.0, "dense": 2.0, OURS: 1.0}))
    assert set(choices) == {(32, 128), (64, 128)}
    assert all(choice.of(128) == OURS and choice.of(129) == "dense" for choice in choices.values())
    assert "32 x 128: triton to 128 rows, dense to 512; 64 x 128: " in caplog.text
    assert {rows for name, rows in ran if name == USUAL} == set(ROWS)


@pytest.mark.parametrize("fault", ["raises", "is wrong", "is NaN"])
def test_a_product_that_fails_or_is_wrong_is_refused_with_the_reason(
    fault: str, ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = PRODUCTS[OURS]

    def faulty(of: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) < 8:
            return sound(of, x, bias)
        if fault == "raises":
            raise OutOfResources("shared memory")
        return sound(of, x, bias) * (1.1 if fault == "is wrong" else torch.nan)

    monkeypatch.setitem(PRODUCTS, OURS, faulty)
    choice = choose([weight()], by_name(ran, {USUAL: 2.0, "dense": 3.0, OURS: 1.0}))
    assert set(choice.names) == {USUAL}
    assert choice.refused.startswith("it does not run" if fault == "raises" else "it is off by")


def test_ours_is_tried_on_every_weight_of_a_shape(
    ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, weights = PRODUCTS[OURS], [weight(seed=seed) for seed in range(5)]

    def faulty(of: Nf4Weight, x: Tensor, bias: Tensor | None) -> Tensor:
        return sound(of, x, bias) * (2 if of is weights[3] and len(x) == 4 else 1)

    monkeypatch.setitem(PRODUCTS, OURS, faulty)
    choice = choose(weights, by_name(ran, {USUAL: 2.0, "dense": 3.0, OURS: 1.0}))
    assert set(choice.names) == {USUAL}
    assert choice.refused == "it is off by 1.000 at 4 rows"


@pytest.mark.parametrize("name", [USUAL, "dense", OURS])
def test_a_product_that_cannot_be_timed_does_not_end_the_start(name: str, ran: list[tuple[str, int]]) -> None:
    """A product may run but fail to be recorded in a graph."""
    taken = by_name(ran, {USUAL: 3.0, "dense": 2.0, OURS: 1.0})

    def seconds_of(run: Callable[[], Tensor]) -> float:
        took = taken(run)
        if ran[-1][0] == name:
            raise OutOfResources("shared memory")
        return took

    choice = choose([weight()], seconds_of)
    best = {USUAL: USUAL, "dense": OURS, OURS: "dense"}[name]
    assert choice.of(1) == best
    assert bool(choice.refused) == (name == OURS)


def test_only_enough_weights_are_read_to_exceed_the_cache(
    ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = weight()
    monkeypatch.setattr(product_timing, "_PAST_CACHE", 2 * one.packed.nbytes)
    choose([one] * 5, by_name(ran, {USUAL: 1.0, "dense": 1.0, OURS: 1.0}))
    assert ran.count((USUAL, 1)) == 2


def test_nothing_is_measured_without_a_gpu() -> None:
    with stopwatch(torch.device("cpu"), graphs=True) as timer:
        assert timer is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [True, False])
def test_a_gpu_is_timed(graphs: bool) -> None:
    gpu = torch.device("cuda")
    x = torch.ones(4096, 4096, device=gpu)
    with stopwatch(gpu, graphs) as timer:
        assert timer is not None
        small, large = timer(lambda: x[:64] @ x), timer(lambda: x @ x)
    assert 0 < small < large < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_all_products_are_correct_and_one_is_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = torch.device("cuda")
    dense = torch.randn(4096, 4096, device=gpu).to(torch.bfloat16)
    packed, state = quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=False)
    of = Nf4Weight(packed, state.absmax, state.code, 4096, 4096, 64, "nf4")
    with stopwatch(gpu, graphs=True) as timer:
        assert timer is not None
        choice = choose([of] * 4, timer)
    assert len(choice.names) == len(ROWS)
    assert not choice.refused
    assert "cannot be timed" not in caplog.text
