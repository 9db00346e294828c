"""The LoRA operation on a GPU, in Triton: two launches for any number of sites that share an input.

The launches depend only on the step's shape. The kernels read the tokens' adapters and the rows' places on
the device. So nothing waits for the device. A CUDA graph of ``prepare(…, graph_tokens=n)`` and the steps'
calls serves any adapters, if ``prepare`` is called before each replay. Only this package of ``adapters``
imports Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels import Segment, check_extents
from adapters.kernels.triton.gather import gather_expand, gather_shrink
from adapters.kernels.triton.grouped import grouped_expand, grouped_shrink
from adapters.kernels.triton.tiles import Tiles, cut, fitting
from adapters.pool.site_pool import SitePool
from adapters.transfer import pinned, send

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

TILE = 64
"""Tokens of a tile for tensor cores."""

_PROGRAMS = 1024
"""Programs that saturate a large GPU's memory: 8 on each of 128 multiprocessors."""


@dataclass(frozen=True)
class Form:
    """A pair of kernels and its constants, for 16-bit types and 48 KB of shared memory.

    Attributes:
        rows: rank rows of a chunk.
        most_workers: the most programs that share one tile's A.
        warps: of a program.
        of_shrink, of_expand: further constants of each kernel.
    """

    shrink: Any
    expand: Any
    rows: int
    most_workers: int
    warps: int
    of_shrink: Mapping[str, int]
    of_expand: Mapping[str, int]


# With one warp, sums over rank rows and over parts never leave its registers: no barriers.
GATHER = Form(gather_shrink, gather_expand, 16, 32, 1, {"BLOCK_K": 128}, {"BLOCK_N": 256})
GROUPED = Form(
    grouped_shrink, grouped_expand, 32, 8, 4, {"BLOCK_K": 64, "M": TILE}, {"BLOCK_N": 64, "M": TILE}
)


class TritonLora:
    """See ``adapters/kernels/__init__.py``. Not thread-safe: a model has one, on the engine's thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: list[Segment] = []
        self._tiles = Tiles(torch.empty(0, 3, dtype=torch.int32), 1)
        self._of_graphs: dict[int, Tensor] = {}

    def __call__(self, y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
        self.foreach([y], x, [pool], segments)

    def prepare(self, segments: list[Segment], graph_tokens: int | None = None) -> None:
        """Copy a step's segments to the device. All layers of the step then pass the same list.

        Args:
            graph_tokens: tokens of the CUDA graph that is captured or replayed next. The graph covers any
                segments within that many tokens, one token for each program, and has a fixed buffer for them.
        """
        self._segments = segments
        if graph_tokens is None:
            host = fitting(segments, TILE)
            self._tiles = Tiles(send(host.of, self._device), host.size)
            return
        if graph_tokens not in self._of_graphs:
            self._of_graphs[graph_tokens] = send(cut([], 1, graph_tokens), self._device)
        self._tiles = Tiles(self._of_graphs[graph_tokens], 1)
        self._tiles.of.copy_(pinned(cut(segments, 1, graph_tokens), self._device), non_blocking=True)

    def foreach(
        self, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], segments: list[Segment]
    ) -> None:
        """The operation at several sites that share the input x; ys [tokens, out_features] by site."""
        assert all(tensor.stride(1) == 1 for tensor in (x, *ys)), "columns must be adjacent"
        for y, pool in zip(ys, pools, strict=True):
            check_extents(y, x, pool, segments)
        if segments is not self._segments:
            self.prepare(segments)
        tiles, size = self._tiles
        if len(tiles):
            form = GATHER if size == 1 else GROUPED
            _launch(form, ys, x, pools, tiles)


def _launch(form: Form, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], tiles: Tensor) -> None:
    tokens, inputs = x.shape
    workers = _workers(form, len(tiles) * len(pools))
    width = max(workers * form.rows, *(pool.max_rank for pool in pools))
    h = torch.empty(len(pools), tokens, width, dtype=torch.float32, device=x.device)
    where = (tiles, tuple(pool.device_site for pool in pools), tokens, width, workers)
    types = types_of(form, pools[0].a.dtype)
    if inputs:
        form.shrink[len(tiles), workers, len(pools)](
            h, x, x.stride(0), *where, inputs, **types, **form.of_shrink, num_warps=form.warps
        )
    outputs = tuple(y.shape[1] for y in ys)
    form.expand[len(tiles), triton.cdiv(max(outputs), form.of_expand["BLOCK_N"]), len(pools)](
        tuple(ys), tuple(y.stride(0) for y in ys), outputs, h, *where,
        **types, **expand_constants(form, workers), num_warps=form.warps,
    )  # fmt: skip


def expand_constants(form: Form, workers: int) -> dict[str, int]:
    """The constants of ``form.expand``. Gathering reads the parts of all workers at once."""
    return {**form.of_expand, "PARTS": workers} if form is GATHER else dict(form.of_expand)


def _workers(form: Form, tiles: int) -> int:
    """Programs that share a tile's A: a power of two, larger if there are few tiles."""
    enough = max(_PROGRAMS // tiles, 1)
    return int(min(1 << (enough.bit_length() - 1), form.most_workers))


def types_of(form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """The types of a launch.

    Triton's interpreter cannot multiply bf16; in float32 bf16's products are exact too.
    """
    types = {"TYPE": _TYPES[dtype], "R": form.rows}
    if form is GROUPED:
        types["DOT"] = tl.float32 if triton.knobs.runtime.interpret else types["TYPE"]
    return types
