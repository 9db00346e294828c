"""The installed flash kernels, compared with gathered pages. They need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from server.engine.attention import AttentionSpec
from server.engine.attention.choice import BUILDS, Build
from server.engine.attention.flash_paged import FlashPaged
from server.engine.attention.torch_paged import TorchPaged
from tests.server.engine.attention.stepped_sequences import PREEMPT, Qkv, World, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LONGEST, GRAPH_BATCH = 800, 4
KINDS = [
    AttentionSpec(0.1),
    AttentionSpec(0.1, 1),
    AttentionSpec(0.1, 300),
    AttentionSpec(0.1, None, 5.0),
]
STEPS = [
    [600, 0, 3],
    [0, 290, 1],
    [1, 1, 1],
    [1, 100, 1],
    [1, PREEMPT, 1],
    [1, 250, 1],
    [1, 150, 1],
    [1, 1, 1],
]


@pytest.fixture(params=BUILDS, ids=lambda build: build.name)
def build(request: pytest.FixtureRequest) -> Build:
    build: Build = request.param
    try:
        build.load()
    except ImportError as error:
        pytest.skip(str(error))
    return build


def make_world(build: Build, dim: int) -> World:
    prompts = [[1] * 600, [1] * 390, [2] * 3]
    return World(
        prompts, 2, 4, dim, build.suits, dtype=torch.bfloat16, device=torch.device("cuda"), longest=LONGEST
    )


def backends(build: Build, world: World) -> tuple[FlashPaged, TorchPaged]:
    place = world.block_size, world.device, world.dtype
    ours, theirs = FlashPaged(build.load(), *place, LONGEST), TorchPaged(*place)
    for backend in (ours, theirs):
        backend.allocate(world.shapes, world.num_blocks)
    return ours, theirs


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("spec", KINDS, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_steps_equal_gathered_pages(build: Build, spec: AttentionSpec, dim: int) -> None:
    if spec.softcap is not None and not build.softcap:
        pytest.skip("this build cannot cap scores")
    world = make_world(build, dim)
    ours, theirs = backends(build, world)
    for step in STEPS:
        chunks = world.step(step)
        qkv = world.inputs(chunks)
        check(run(ours, spec, chunks, qkv), run(theirs, spec, chunks, qkv))
        world.done(chunks)


@pytest.mark.parametrize("spec", KINDS[:3], ids=str)
def test_one_graph_serves_all_decode_steps(build: Build, spec: AttentionSpec) -> None:
    world = make_world(build, 128)
    ours, theirs = backends(build, world)
    graph, inputs, out = captured(ours, world, spec)
    chunks = world.step([LONGEST] * 3)
    qkv = world.inputs(chunks)
    for backend in (ours, theirs):
        run(backend, spec, chunks, qkv)
    world.done(chunks)
    for live in (1, 3, 2, 3):
        chunks = world.step([1] * live)
        qkv = world.inputs(chunks)
        for static, new in zip(inputs, qkv, strict=True):
            static[:live] = new
        ours.begin(chunks, GRAPH_BATCH)
        graph.replay()
        check(out[:live], run(theirs, spec, chunks, qkv))
        world.done(chunks)


def captured(
    backend: FlashPaged, world: World, spec: AttentionSpec
) -> tuple[torch.cuda.CUDAGraph, Qkv, Tensor]:
    """A graph of the attention for GRAPH_BATCH sequences, its inputs and its output."""
    heads = world.kv_heads * world.group, world.kv_heads, world.kv_heads
    q, k, v = (torch.zeros(GRAPH_BATCH, n, world.dim, dtype=world.dtype, device=world.device) for n in heads)
    backend.begin([], GRAPH_BATCH)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backend(0, q, k, v, spec)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend(0, q, k, v, spec)
    return graph, (q, k, v), out
