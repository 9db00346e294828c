"""Section ``attention``: compares the builds that read pages in place with the backend that gathers them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.bench.gpu_check.context import Context, Gpu
from server.bench.gpu_check.rows import Row, Value, skipped
from server.bench.gpu_check.timing import seconds_of
from server.engine import sequence
from server.engine.attention import AttentionBackend, AttentionSpec, KvShape
from server.engine.attention.choice import BUILDS, Build
from server.engine.attention.flash_paged import FlashPaged, PagedKernel
from server.engine.attention.torch_paged import TorchPaged
from server.engine.kv_cache import BlockTable, chain_root
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk

_EXACT = 3e-2
"""Tolerance for values of about 1 in bf16. Only the attention weights are rounded differently."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    shape: KvShape
    group: int
    lengths: Sequence[int]
    """The tokens of each sequence."""


_LARGE = _Sizes(KvShape(8, 128, 128), 4, (1, 700, 63, 256, 257, 1024, 5, 90))
_SMALL = _Sizes(KvShape(2, 16, 16), 2, (1, 9, 20))
_DECODING = tuple(1000 + i for i in range(64))


def run(context: Context) -> Iterator[Row]:
    """For each build and kind of layer: whether prompts and decoding agree. On a GPU also the time."""
    sizes = _LARGE if context.gpu else _SMALL
    scale = sizes.shape.key_dim**-0.5
    specs = {
        "plain": AttentionSpec(scale),
        "window": AttentionSpec(scale, window=max(sizes.lengths) // 3),
        "softcap": AttentionSpec(scale, softcap=20.0),
    }
    for build in BUILDS:
        try:
            kernel = build.load()
        except (ImportError, OSError) as error:
            yield skipped("equal to gathered pages", f"{build.name}: {error}")
            continue
        if context.gpu is None and "Triton" not in kernel.name:
            yield skipped("equal to gathered pages", f"{build.name}: needs a GPU")
            continue
        yield from _of_build(context, build, kernel, sizes, specs)


def _of_build(
    context: Context, build: Build, kernel: PagedKernel, sizes: _Sizes, specs: dict[str, AttentionSpec]
) -> Iterator[Row]:
    for name, spec in specs.items():
        context.check_time()
        if spec.softcap is None or build.softcap:
            values: dict[str, Value] = {
                "backend": kernel.name,
                "layer": name,
                "sequences": len(sizes.lengths),
            }
            yield Row("equal to gathered pages", values, _compare(context, build, kernel, sizes, spec))
    if context.gpu is not None:
        yield _timed(context.gpu, build, kernel, specs["plain"])


def _compare(context: Context, build: Build, kernel: PagedKernel, sizes: _Sizes, spec: AttentionSpec) -> str:
    """The error in the prompt step or in the decode step after it; "" = none."""
    world = _World(sizes, build.suits, context.device)
    gathered = TorchPaged(build.suits, context.device, torch.bfloat16)
    paged = FlashPaged(kernel, build.suits, context.device, torch.bfloat16, max(sizes.lengths) + 1)
    for backend in (gathered, paged):
        backend.allocate({0: sizes.shape}, world.num_blocks)
    for decoding in (False, True):
        chunks = world.step(decoding)
        qkv = world.inputs(chunks)
        expected, got = (_attend(backend, chunks, qkv, spec).float() for backend in (gathered, paged))
        if not torch.allclose(got, expected, rtol=_EXACT, atol=_EXACT):
            step = "decoding" if decoding else "prompts"
            return f"{step}: off by {(got - expected).abs().max().item():.3g}"
    return ""


def _attend(
    backend: AttentionBackend, chunks: Sequence[Chunk], qkv: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    backend.begin(chunks)
    q, k, v = qkv
    return backend(0, q, k, v, spec)


def _timed(gpu: Gpu, build: Build, kernel: PagedKernel, spec: AttentionSpec) -> Row:
    """The time of one layer of the 8B shape that decodes 64 sequences of at least 1000 tokens."""
    device, sizes = torch.device("cuda"), _Sizes(_LARGE.shape, _LARGE.group, _DECODING)
    world = _World(sizes, build.suits, device)
    backend = FlashPaged(kernel, build.suits, device, torch.bfloat16, 2048)
    backend.allocate({0: sizes.shape}, world.num_blocks)
    chunks = world.step(decoding=True)
    q, _, _ = world.inputs(chunks)
    backend.begin(chunks, graph_batch_size=len(chunks))
    took = seconds_of([lambda: backend.attend(0, q, spec)])
    least = sum(_DECODING) * sizes.shape.bytes_per_token(torch.bfloat16) / gpu.machine.bandwidth
    values: dict[str, Value] = {"backend": kernel.name, "sequences": len(_DECODING), "tokens": sum(_DECODING)}
    values |= {
        "us": round(took * 1e6, 2),
        "floor us": round(least * 1e6, 2),
        "times the floor": round(took / least, 2),
    }
    return Row("time of a decoding layer", values)


class _World:
    """Sequences whose blocks are scattered over the cache."""

    def __init__(self, sizes: _Sizes, block_size: int, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        counts = [-(-(length + 1) // block_size) for length in sizes.lengths]
        self.num_blocks = sum(counts)
        free = random.Random(0).sample(range(self.num_blocks), self.num_blocks)
        params = SamplingParams(max_tokens=1)
        self._sequences = []
        for i, (length, count) in enumerate(zip(sizes.lengths, counts, strict=True)):
            one = sequence.Sequence(str(i), 0, (1,) * (length + 1), None, params, 0, i, frozenset())
            one.table = BlockTable(chain_root(None))
            one.table.blocks = [free.pop() for _ in range(count)]
            self._sequences.append(one)

    def step(self, decoding: bool) -> list[Chunk]:
        """The chunks of a step: all prompts at once, or one more token of each sequence."""
        pairs = zip(self._sequences, self._sizes.lengths, strict=True)
        return [Chunk(one, length if decoding else 0, 1 if decoding else length) for one, length in pairs]

    def inputs(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Random q, k and v, each [tokens, heads, head_dim]."""
        tokens, shape = sum(chunk.length for chunk in chunks), self._sizes.shape
        heads = shape.kv_heads * self._sizes.group, shape.kv_heads, shape.kv_heads
        generator = torch.Generator().manual_seed(tokens)
        made = (torch.randn(tokens, count, shape.key_dim, generator=generator) for count in heads)
        return [values.to(self._device, torch.bfloat16) for values in made]
