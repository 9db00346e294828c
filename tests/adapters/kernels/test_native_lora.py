"""The native LoRA kernel on several linears with one input, compared with the reference loop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.artifact import LoraWeights
from adapters.kernels import Segment
from adapters.kernels.reference import reference_lora
from adapters.pool.site_pool import SitePool, lone_pool
from adapters.sites import Site
from tests.support.native_kernels import ISAS, lora, threads, using


@dataclass(frozen=True)
class Case:
    """Some linears on one input.

    Attributes:
        inputs, outputs: the sizes of the linears.
        ranks: for each adapter, its rank at each linear; 0 = it does not change that one.
        runs: (adapter, tokens); -1 = no adapter.
        padding: the elements between the rows of x, and of y.
    """

    inputs: int
    outputs: list[int]
    ranks: list[list[int]]
    runs: list[tuple[int, int]]
    padding: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    outputs = draw(st.lists(st.integers(1, 100), min_size=1, max_size=3))
    rank = st.one_of(st.just(0), st.integers(1, 19))
    ranks = draw(
        st.lists(st.lists(rank, min_size=len(outputs), max_size=len(outputs)), min_size=1, max_size=4)
    )
    run = st.tuples(st.integers(-1, len(ranks) - 1), st.integers(1, 40))
    runs = draw(st.lists(run, min_size=1, max_size=5))
    return Case(
        draw(st.integers(1, 140)), outputs, ranks, runs, draw(st.integers(0, 3)), draw(st.integers(0, 99))
    )


class Setup:
    """The tensors of a case. ``y`` holds all linears' outputs side by side. Unused rank rows hold NaN."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.pools = [self._pool(case, i) for i in range(len(case.outputs))]
        self.segments, token = [], 0
        for adapter, length in case.runs:
            if adapter >= 0:
                self.segments.append(Segment(adapter, token, token + length))
            token += length
        self.x = torch.randn(token, case.inputs + case.padding).bfloat16()[:, : case.inputs]
        self.y = torch.randn(token, sum(case.outputs) + case.padding).bfloat16()
        self.outputs = case.outputs

    def _pool(self, case: Case, site: int) -> SitePool:
        """The adapters' rank rows at one linear, in random places."""
        ranks = [of_adapter[site] for of_adapter in case.ranks]
        free = torch.randperm(2 * sum(ranks) + 1).tolist()
        sizes = Site(f"site{site}", case.inputs, case.outputs[site])
        pool = lone_pool(sizes, len(free), torch.bfloat16, torch.device("cpu"))
        pool.a.fill_(torch.nan)
        pool.b.fill_(torch.nan)
        for slot, rank in enumerate(ranks):
            pool.ensure_slot(slot)
            if rank:
                rows = sorted(free.pop() for _ in range(rank))
                a, b = torch.randn(rank, case.inputs), torch.randn(rank, case.outputs[site])
                pool.write(slot, rows, LoraWeights((a / 4).bfloat16(), (b / 4).bfloat16()))
        return pool

    def parts(self, y: Tensor) -> list[Tensor]:
        return list(torch.split(y[:, : sum(self.outputs)], self.outputs, dim=1))


@settings(deadline=None, max_examples=40)
@given(cases())
@pytest.mark.parametrize("isa", ISAS)
def test_several_linears_equal_the_reference(isa: str, case: Case) -> None:
    made = Setup(case)
    expected, got = made.y.float(), made.y.clone()
    for part, pool in zip(made.parts(expected), made.pools, strict=True):
        reference_lora(part, made.x, pool, made.segments)
    with using(isa) as loaded:
        lora(loaded, made.parts(got), made.x, made.pools, made.segments)
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.1)
    changed = torch.zeros(len(got), dtype=torch.bool)
    for _, start, stop in made.segments:
        changed[start:stop] = True
    assert torch.equal(got[~changed], made.y[~changed])
    assert torch.equal(got[:, sum(case.outputs) :], made.y[:, sum(case.outputs) :]), (
        "the kernel wrote outside its rows"
    )


@settings(deadline=None, max_examples=25)
@given(cases())
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_and_on_two_threads(isa: str, case: Case) -> None:
    made = Setup(case)
    together, single = made.y.clone(), made.y.clone()
    with using(isa) as loaded:
        with threads(2):
            lora(loaded, made.parts(together), made.x, made.pools, made.segments)
        with threads(1):
            for slot, start, stop in made.segments:
                for t in range(start, stop):
                    for y, pool in zip(made.parts(single), made.pools, strict=True):
                        lora(loaded, [y[t:]], made.x[t:], [pool], [Segment(slot, 0, 1)])
    assert torch.equal(together, single)
