"""Compares the Triton kernels with the reference, on a GPU or else with Triton's interpreter.

pytest does not collect this file: ``test_triton_lora.py`` runs it in a process that uses the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.kernels import Segment, cases, triton
from adapters.kernels.cases import batch, check, expected, runs_by_mix, segments_of
from adapters.kernels.triton import TILE, TritonLora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = runs_by_mix(TILE)
World = partial(cases.World, device=DEVICE)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few programs, to keep the interpreter fast. Another test covers how programs share the work."""
    monkeypatch.setattr(triton, "_PROGRAMS", 48)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def world(request: pytest.FixtureRequest) -> cases.World:
    return World(dtype=request.param).add_all()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_any_mix_of_adapters_equals_the_reference(world: cases.World, runs: list[tuple[int, int]]) -> None:
    check(TritonLora(DEVICE), world, *segments_of(runs))


@pytest.mark.parametrize("runs", [RUNS["zipf"][:2], [(4, TILE)]], ids=["gather", "grouped"])
@pytest.mark.parametrize("programs", [1, 7, 50, 1024])
def test_any_number_of_programs_gives_the_same(
    programs: int, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many programs have no work, because K has only two blocks."""
    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    world = World(inputs=300, outputs=(40, 16))
    for slot, ranks in enumerate([[40, 16], [256, 1], [0, 3], [1, 1], [100, 33]]):
        world.add(slot, ranks)
    check(TritonLora(DEVICE), world, *segments_of(runs))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("runs", [[(0, 2), (1, 1)], [(0, 9), (1, 20)]], ids=["gather", "grouped"])
@pytest.mark.parametrize(
    ("pool", "x", "y"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_types_may_differ(
    pool: torch.dtype, x: torch.dtype, y: torch.dtype, runs: list[tuple[int, int]]
) -> None:
    world = World(outputs=(24, 16), dtype=pool)
    world.add(0, [5, 16], scaled=True)
    world.add(1, [20, 0], shifted=True)
    check(TritonLora(DEVICE), world, *segments_of(runs), (x, y))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("inputs", [1, 17, 257])
@pytest.mark.parametrize("runs", [[(0, 1)], [(0, 17)]], ids=["gather", "grouped"])
def test_odd_sizes(inputs: int, runs: list[tuple[int, int]]) -> None:
    world = World(inputs=inputs, outputs=(1, 259))
    world.add(0, [3, 1])
    check(TritonLora(DEVICE), world, *segments_of(runs))


def test_a_site_without_an_input_is_only_adjusted() -> None:
    """The embedding is such a site if the adapter has no LoRA there."""
    world = World(inputs=0, outputs=(24, 16))
    world.add(0, [0, 0], scaled=True, shifted=True)
    check(TritonLora(DEVICE), world, *segments_of([(0, 3)]))


def test_a_step_without_tokens_of_adapters_launches_nothing() -> None:
    world = World(outputs=(24, 16)).add_all()
    check(TritonLora(DEVICE), world, [], 4)
    check(TritonLora(DEVICE), world, [Segment(0, 2, 2)], 4)


def test_slots_are_reused_and_tables_grow() -> None:
    world = World(outputs=(24, 16))
    kernel = TritonLora(DEVICE)
    world.add(0, [4, 3], scaled=True, shifted=True)
    for pool in world.pools + world.references:
        pool.free(0, [])
        pool.send(0)
    check(kernel, world, *segments_of([(0, 2)]))
    world.add(0, [2, 7])
    world.add(40, [3, 5])
    check(kernel, world, *segments_of([(0, 2), (40, 1)]))


def capture(
    kernel: TritonLora, ys: list[Tensor], x: Tensor, world: cases.World, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Replays the CUDA graph of a call for 8 tokens. Without a GPU it repeats the same launches."""
    segments = [Segment(0, 0, 1)]
    kernel.prepare(segments, graph_tokens=8)
    kernel.foreach(ys, x, world.pools, segments)  # compiles
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.foreach(ys, x, world.pools, segments)
        return graph.replay
    launches: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patched:
        patched.setattr(triton, "_launch", lambda *arguments: launches.append(arguments))
        kernel.foreach(ys, x, world.pools, segments)
    return lambda: triton._launch(*launches[0])


@pytest.mark.usefixtures("few")
def test_a_graph_serves_other_adapters_than_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """More adapters, larger ranks, larger tables, fewer tokens, and no adapters at all."""
    world = World(outputs=(24, 16))
    world.add(0, [2, 1])
    kernel = TritonLora(DEVICE)
    x, ys = batch(world, 8, world.dtype, world.dtype)
    replay = capture(kernel, ys, x, world, monkeypatch)
    for slot, ranks in enumerate([[40, 1], [16, 33], [0, 5]], start=30):
        world.add(slot, ranks, scaled=slot == 31)
    for runs in ([(30, 1), (31, 2), (32, 1), (0, 3), (-1, 1)], [(-1, 3), (32, 1)], []):
        segments, _ = segments_of(runs)
        new_x, new_ys = batch(world, 8, world.dtype, world.dtype)
        results = expected(world, new_x, new_ys, segments)
        x.copy_(new_x)
        for y, new in zip(ys, new_ys, strict=True):
            y.copy_(new)
        kernel.prepare(segments, graph_tokens=8)
        replay()
        for y, result in zip(ys, results, strict=True):
            torch.testing.assert_close(y.float().cpu(), result, rtol=0.03, atol=0.03)
