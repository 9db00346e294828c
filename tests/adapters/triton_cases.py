"""The Triton kernels against the reference: on the GPU if there is one, else under Triton's interpreter.

Not collected by itself: the interpreter is chosen for a whole process (``test_triton_lora.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.artifact import Adjustment, LoraWeights
from adapters.extras_pool import moved_adjustments
from adapters.kernels import Segment, triton
from adapters.kernels.reference import reference_lora
from adapters.kernels.triton import TILE, TritonLora
from adapters.site_pool import SitePool, lone_pool
from adapters.sites import Site

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANKS = [16, 1, 64, 8, 256, 17, 3, 32]
"""Of the adapters at the first site; at the next one each has the next one's rank, or none at all."""

RUNS = {
    "distinct": [(i, 1) for i in range(8)],
    "identical": [(4, 9)],
    "uniform": [(i % 8, 1) for i in range(0, 36, 3)],
    "zipf": [(0, 6), (1, 3), (2, 2), (3, 1), (4, 1), (5, 1)],
    "base tokens between": [(-1, 2), (0, 1), (-1, 1), (1, 2), (-1, 3)],
    "base tokens alone": [(-1, 3)],
    "prompts": [(4, TILE + 5), (-1, 3), (1, 7), (4, 20)],
    "one long prompt among decoding": [(2, 2 * TILE), (0, 1), (-1, 2), (5, 1)],
}
EXACT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class World:
    """The same adapters in pools for the kernels and in pools for the reference, some sites on one input.

    Rows lie scattered, and those that nobody owns hold NaN.
    """

    inputs: int = 72
    outputs: tuple[int, ...] = (80, 24, 33)
    dtype: torch.dtype = torch.bfloat16
    pools: list[SitePool] = field(init=False)
    references: list[SitePool] = field(init=False)
    free: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.pools, self.references = (
            [lone_pool(Site("site", self.inputs, out), 600, self.dtype, device) for out in self.outputs]
            for device in (DEVICE, CPU)
        )
        for pool in self.pools + self.references:
            pool.a.fill_(torch.nan)
            pool.b.fill_(torch.nan)
        self.free = [torch.randperm(600).tolist() for _ in self.outputs]

    def add(self, slot: int, ranks: list[int], scaled: bool = False, shifted: bool = False) -> None:
        """An adapter of these ranks at the sites; 0 = it has no pair there."""
        for site, rank in enumerate(ranks):
            rows = sorted(self.free[site].pop() for _ in range(rank))
            a = torch.randn(rank, self.inputs) / self.inputs**0.5
            b = torch.randn(rank, self.outputs[site]) / max(rank, 1) ** 0.5
            vectors = [torch.randn(self.outputs[site]) if has else None for has in (scaled, shifted)]
            for pool in (self.pools[site], self.references[site]):
                pool.hold(slot)
                if rank:
                    pool.write(slot, rows, LoraWeights(a.to(self.dtype), b.to(self.dtype)))
                if scaled or shifted:
                    pool.adjust(slot, moved_adjustments({"": Adjustment(*vectors)}, pool.a.device)[""])
                pool.send(slot)

    def add_all(self) -> World:
        for i in range(len(RANKS)):
            ranks = [RANKS[(i + site) % len(RANKS)] for site in range(len(self.outputs))]
            if i % 3 == 1:
                ranks[i % len(ranks)] = 0
            self.add(i, ranks, scaled=i in (1, 2), shifted=i in (2, 3))
        return self


def segments_of(runs: list[tuple[int, int]]) -> tuple[list[Segment], int]:
    """Segments, and the number of tokens; adapter -1 is the base."""
    segments, token = [], 0
    for slot, length in runs:
        if slot >= 0:
            segments.append(Segment(slot, token, token + length))
        token += length
    return segments, token


def batch(world: World, tokens: int, x_type: torch.dtype, y_type: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x, and ys: the first two lie side by side in one tensor, as a fused projection has them."""
    x = torch.randn(tokens, world.inputs + 8).to(DEVICE, x_type)[:, : world.inputs]
    ys = [torch.randn(tokens, out).to(DEVICE, y_type) for out in world.outputs]
    joined = torch.cat(ys[:2], dim=1)
    return x, [*torch.split(joined, [y.shape[1] for y in ys[:2]], dim=1), *ys[2:]]


def expected(world: World, x: Tensor, ys: list[Tensor], segments: list[Segment]) -> list[Tensor]:
    results = [y.float().cpu() for y in ys]
    for result, pool in zip(results, world.references, strict=True):
        reference_lora(result, x.cpu(), pool, segments)
    return results


def check(
    kernel: TritonLora,
    world: World,
    segments: list[Segment],
    tokens: int,
    types: tuple[torch.dtype, torch.dtype] | None = None,
) -> None:
    x, ys = batch(world, tokens, *(types or (world.dtype, world.dtype)))
    before = [y.clone() for y in ys]
    results = expected(world, x, ys, segments)
    kernel.together(ys, x, world.pools, segments)
    exact = max(EXACT[dtype] for dtype in (world.dtype, x.dtype, ys[0].dtype))
    idle = torch.ones(tokens, dtype=torch.bool)
    for _, start, stop in segments:
        idle[start:stop] = False
    for y, result, old in zip(ys, results, before, strict=True):
        torch.testing.assert_close(y.float().cpu(), result, rtol=exact, atol=exact)
        assert torch.equal(y[idle], old[idle]), "a token of the base was changed"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few programs that the interpreter is done soon; how they share the work is tested by itself."""
    monkeypatch.setattr(triton, "_PROGRAMS", 48)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def world(request: pytest.FixtureRequest) -> World:
    return World(dtype=request.param).add_all()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_any_mix_of_adapters_equals_the_reference(world: World, runs: list[tuple[int, int]]) -> None:
    check(TritonLora(DEVICE), world, *segments_of(runs))


@pytest.mark.parametrize("runs", [RUNS["zipf"][:2], [(4, TILE)]], ids=["gather", "grouped"])
@pytest.mark.parametrize("programs", [1, 7, 50, 1024])
def test_any_number_of_workers_gives_the_same(
    programs: int, runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which many find nothing to do: K is only two blocks long."""
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
    """As the embedding of an adapter that changes nothing else there."""
    world = World(inputs=0, outputs=(24, 16))
    world.add(0, [0, 0], scaled=True, shifted=True)
    check(TritonLora(DEVICE), world, *segments_of([(0, 3)]))


def test_a_step_without_tokens_of_adapters_launches_nothing() -> None:
    world = World(outputs=(24, 16)).add_all()
    check(TritonLora(DEVICE), world, [], 4)
    check(TritonLora(DEVICE), world, [Segment(0, 2, 2)], 4)


def test_slots_are_taken_over_and_tables_grow() -> None:
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
    kernel: TritonLora, ys: list[Tensor], x: Tensor, world: World, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """A CUDA graph's replay of a call for 8 tokens; without a GPU, the very launches again."""
    segments = [Segment(0, 0, 1)]
    kernel.prepare(segments, graph_tokens=8)
    kernel.together(ys, x, world.pools, segments)  # compiles
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel.together(ys, x, world.pools, segments)
        return graph.replay
    launches: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patched:
        patched.setattr(triton, "_launch", lambda *arguments: launches.append(arguments))
        kernel.together(ys, x, world.pools, segments)
    return lambda: triton._launch(*launches[0])


@pytest.mark.usefixtures("few")
def test_a_graph_serves_other_adapters_than_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them, of larger ranks, in tables that have grown; fewer tokens; and none at all."""
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
