"""Random adapters and steps for comparing a LoRA kernel with the reference.

The kernels' tests, their trial on a GPU and ``manylora bench gpu-check`` use them. They have ranks 1 to 256
that differ by site, DoRA's scales, biases' shifts, scattered rows, and steps with few or many tokens for an
adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from adapters.artifact import Adjustment, LoraWeights
from adapters.kernels import Segment
from adapters.kernels.reference import reference_lora
from adapters.pool.extras_pool import moved_adjustments
from adapters.pool.site_pool import SitePool, lone_pool
from adapters.sites import Site

CPU = torch.device("cpu")

Run = tuple[int, int]
"""An adapter's slot (-1: the base) and its number of tokens."""


class JoinedKernel(Protocol):
    """A ``LoraKernel`` for sites that share an input."""

    def foreach(
        self, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], segments: list[Segment]
    ) -> None: ...


RANKS = [16, 1, 64, 8, 256, 17, 3, 32]
"""The adapters' ranks at the first site. At the next site each has the next rank, or none."""

EXACT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative tolerance, which is absolute for values near 1."""


def runs_by_mix(tile: int) -> dict[str, list[Run]]:
    """Steps by name. ``tile``: the number of an adapter's tokens from which a kernel takes another path."""
    return {
        "distinct": [(i, 1) for i in range(8)],
        "identical": [(4, 9)],
        "uniform": [(i % 8, 1) for i in range(0, 36, 3)],
        "zipf": [(0, 6), (1, 3), (2, 2), (3, 1), (4, 1), (5, 1)],
        "base tokens between": [(-1, 2), (0, 1), (-1, 1), (1, 2), (-1, 3)],
        "base tokens alone": [(-1, 3)],
        "prompts": [(4, tile + 5), (-1, 3), (1, 7), (4, 20)],
        "one long prompt among decoding": [(2, 2 * tile), (0, 1), (-1, 2), (5, 1)],
    }


@dataclass
class World:
    """The same adapters in pools for the kernels and in pools for the reference, at sites that share an
    input.

    Rows are scattered, and free rows contain NaN.
    """

    inputs: int = 72
    outputs: tuple[int, ...] = (80, 24, 33)
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU
    pools: list[SitePool] = field(init=False)
    references: list[SitePool] = field(init=False)
    free: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.pools, self.references = (
            [lone_pool(Site("site", self.inputs, out), 600, self.dtype, device) for out in self.outputs]
            for device in (self.device, CPU)
        )
        for pool in self.pools + self.references:
            pool.a.fill_(torch.nan)
            pool.b.fill_(torch.nan)
        self.free = [torch.randperm(600).tolist() for _ in self.outputs]

    def add(self, slot: int, ranks: list[int], scaled: bool = False, shifted: bool = False) -> None:
        """An adapter with these ranks at the sites. 0 = no pair at the site."""
        for site, rank in enumerate(ranks):
            rows = sorted(self.free[site].pop() for _ in range(rank))
            a = torch.randn(rank, self.inputs) / self.inputs**0.5
            b = torch.randn(rank, self.outputs[site]) / max(rank, 1) ** 0.5
            vectors = [torch.randn(self.outputs[site]) if has else None for has in (scaled, shifted)]
            for pool in (self.pools[site], self.references[site]):
                pool.ensure_slot(slot)
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


def segments_of(runs: list[Run]) -> tuple[list[Segment], int]:
    """Segments, and the number of tokens; adapter -1 is the base."""
    segments, token = [], 0
    for slot, length in runs:
        if slot >= 0:
            segments.append(Segment(slot, token, token + length))
        token += length
    return segments, token


def batch(world: World, tokens: int, x_type: torch.dtype, y_type: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x and ys. The first two ys are adjacent in one tensor, as in a fused projection."""
    x = torch.randn(tokens, world.inputs + 8).to(world.device, x_type)[:, : world.inputs]
    ys = [torch.randn(tokens, out).to(world.device, y_type) for out in world.outputs]
    joined = torch.cat(ys[:2], dim=1)
    return x, [*torch.split(joined, [y.shape[1] for y in ys[:2]], dim=1), *ys[2:]]


def expected(world: World, x: Tensor, ys: list[Tensor], segments: list[Segment]) -> list[Tensor]:
    results = [y.float().cpu().clone() for y in ys]  # on a CPU float32 would be y itself
    for result, pool in zip(results, world.references, strict=True):
        reference_lora(result, x.cpu(), pool, segments)
    return results


def check(
    kernel: JoinedKernel,
    world: World,
    segments: list[Segment],
    tokens: int,
    types: tuple[torch.dtype, torch.dtype] | None = None,
) -> None:
    """Raises AssertionError unless ``kernel`` equals the reference on random x and y.

    ``types``: the types of x and y; None = the pools' type.
    """
    x, ys = batch(world, tokens, *(types or (world.dtype, world.dtype)))
    before = [y.clone() for y in ys]
    results = expected(world, x, ys, segments)
    kernel.foreach(ys, x, world.pools, segments)
    exact = max(EXACT[dtype] for dtype in (world.dtype, x.dtype, ys[0].dtype))
    idle = torch.ones(tokens, dtype=torch.bool)
    for _, start, stop in segments:
        idle[start:stop] = False
    for y, result, old in zip(ys, results, before, strict=True):
        torch.testing.assert_close(y.float().cpu(), result, rtol=exact, atol=exact)
        assert torch.equal(y[idle], old[idle]), "a token of the base was changed"
