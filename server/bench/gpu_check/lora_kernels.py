"""Section ``lora_kernels``: compares Triton's LoRA with the reference. On a GPU it also measures its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.artifact import LoraWeights
from adapters.kernels.cases import Run, World, check, runs_by_mix, segments_of
from adapters.pool.site_pool import SitePool, lone_pool
from adapters.sites import Site
from server.bench.gpu_check.context import Context, Gpu
from server.bench.gpu_check.rows import Row, Skip, Value
from server.bench.gpu_check.timing import seconds_of
from server.bench.roofline import llama_stack
from server.bench.shapes import SHAPES

if TYPE_CHECKING:
    from adapters.kernels.triton import TritonLora

_LARGE = (4096, (4096, 1024, 1024))
"""The input and outputs of an 8B model's q, k and v. ``World``'s default sizes are small and odd."""

_RANK = 16
_INTERPRETED = ("zipf", "base tokens between")


def run(context: Context) -> Iterator[Row]:
    """For each dtype and mix: whether the kernels equal the reference. Then the times."""
    if find_spec("triton") is None:
        raise Skip("Triton is not installed")
    from adapters.kernels.triton import TILE, TritonLora

    mixes = runs_by_mix(TILE)
    kernel = TritonLora(context.device)
    if context.gpu is None:
        mixes = {name: mixes[name] for name in _INTERPRETED} | {"prompt": [(4, 17)]}
        yield from _cases(context, kernel, [World(dtype=torch.bfloat16, outputs=(24, 16))], mixes)
        return
    for dtype in (torch.bfloat16, torch.float16):
        inputs, outputs = _LARGE
        worlds = [World(dtype=dtype, device=context.device)]
        worlds += [World(inputs, outputs, dtype, context.device)]
        yield from _cases(context, kernel, worlds, mixes)
    yield from _times(context, context.gpu, kernel)


def _cases(
    context: Context, kernel: TritonLora, worlds: Sequence[World], mixes: dict[str, list[Run]]
) -> Iterator[Row]:
    for world in worlds:
        world.add_all()
        for mix, runs in mixes.items():
            context.check_time()
            segments, tokens = segments_of(runs)
            sizes = f"{world.inputs} to {', '.join(map(str, world.outputs))}"
            values: dict[str, Value] = {
                "dtype": str(world.dtype)[6:],
                "features": sizes,
                "mix": mix,
                "tokens": tokens,
            }
            yield Row(
                "equal to the reference", values, _failure(partial(check, kernel, world, segments, tokens))
            )


def _failure(compare: Callable[[], None]) -> str:
    try:
        compare()
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return ""


def _times(context: Context, gpu: Gpu, kernel: TritonLora) -> Iterator[Row]:
    """The time of all LoRA calls of one block of the 8B shape, launched as in a decode step."""
    block = _Block(context.device, adapters=128)
    for tokens, adapters in ((1, 1), (8, 8), (64, 1), (64, 8), (64, 64), (128, 128)):
        context.check_time()
        runs = [(i * adapters // tokens, 1) for i in range(tokens)]
        took = seconds_of(block.calls(kernel, runs))
        least = 2 * _RANK * adapters * block.row_width / gpu.machine.bandwidth
        yield Row(
            "time in a block",
            {
                "tokens": tokens,
                "adapters": adapters,
                "us": round(took * 1e6, 1),
                "floor us": round(least * 1e6, 1),
                "times the floor": round(took / least, 2),
            },
        )


class _Block:
    """Rank rows for every linear of one block. Linears with the same input are one group."""

    def __init__(self, device: torch.device, adapters: int) -> None:
        linears = llama_stack(SHAPES["llama-8b"]).linears[:7]
        q, k, v, o, gate, up, down = (self._pool(device, *sizes, adapters) for sizes in linears)
        self._groups = [[q, k, v], [o], [gate, up], [down]]
        self.row_width = sum(inputs + outputs for inputs, outputs in linears)
        self._device = device

    def calls(self, kernel: TritonLora, runs: list[Run]) -> list[Callable[[], object]]:
        """One call that runs all groups, so that it reads the block's weights once."""
        segments, tokens = segments_of(runs)
        kernel.prepare(segments, graph_tokens=tokens)
        inputs = [self._random(tokens, group[0].a.shape[1]) for group in self._groups]
        outputs = [[self._random(tokens, pool.b.shape[1]) for pool in group] for group in self._groups]

        def block() -> None:
            for ys, x, pools in zip(outputs, inputs, self._groups, strict=True):
                kernel.foreach(ys, x, pools, segments)

        return [block]

    def _pool(self, device: torch.device, inputs: int, outputs: int, adapters: int) -> SitePool:
        pool = lone_pool(Site("site", inputs, outputs), adapters * _RANK, torch.bfloat16, device, _RANK)
        for slot in range(adapters):
            pool.ensure_slot(slot)
            rows = list(range(slot * _RANK, (slot + 1) * _RANK))
            a, b = (0.01 * torch.randn(_RANK, width, device=device) for width in (inputs, outputs))
            pool.write(slot, rows, LoraWeights(a.to(torch.bfloat16), b.to(torch.bfloat16)))
            pool.send(slot)
        return pool

    def _random(self, tokens: int, width: int) -> Tensor:
        return torch.randn(tokens, width, device=self._device).to(torch.bfloat16)
