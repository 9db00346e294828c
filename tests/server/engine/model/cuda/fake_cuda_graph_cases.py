"""Graphs of interpreted Triton kernels.

pytest does not collect this file: ``test_interpreted.py`` runs it.
"""

from __future__ import annotations

import pytest
import torch

from adapters.kernels import Segment, triton
from adapters.kernels.cases import World, batch, expected, segments_of
from adapters.kernels.triton import TritonLora
from server.engine.kernels import reference
from server.engine.kernels import triton as ops
from tests.server.engine.model.cuda.fake_cuda_graph import RecordedGraph

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has real graphs")


def test_a_graph_serves_other_adapters_than_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """No adapters at the capture; then several with other ranks in larger tables, then fewer, then none."""
    monkeypatch.setattr(triton, "_PROGRAMS", 48)
    world, kernel, graph = World(outputs=(24, 16)), TritonLora(torch.device("cpu")), RecordedGraph()
    nobody: list[Segment] = []
    kernel.prepare(nobody, graph_tokens=8)
    x, ys = batch(world, 8, world.dtype, world.dtype)

    def run() -> torch.Tensor:
        kernel.foreach(ys, x, world.pools, nobody)
        return ys[0] + 0

    result = graph.capture(run)
    for slot, ranks in enumerate([[40, 1], [16, 33], [0, 5]], start=30):
        world.add(slot, ranks, scaled=slot == 31)
    for runs in ([(30, 1), (31, 2), (32, 1), (-1, 1)], [(-1, 3), (32, 1)], []):
        segments, _ = segments_of(runs)
        kernel.prepare(segments, graph_tokens=8)
        values = [tensor.clone() for tensor in batch(world, 8, world.dtype, world.dtype)[1]]
        for y, new in zip(ys, values, strict=True):
            y.copy_(new)
        awaited = expected(world, x, ys, segments)
        graph.replay()
        for y, right in zip(ys, awaited, strict=True):
            torch.testing.assert_close(y.float(), right, rtol=0.03, atol=0.03)
        assert torch.equal(result, ys[0])


def test_a_graph_of_a_blocks_kernels_reads_the_current_values() -> None:
    x, delta, weight = torch.randn(3, 40), torch.randn(3, 40), torch.rand(40)
    graph = RecordedGraph()
    result = graph.capture(lambda: ops.act_and_mul(ops.fused_add_rms_norm(x, delta, weight, 1e-5), gelu=True))
    x.copy_(torch.randn(3, 40))
    delta.copy_(torch.randn(3, 40))
    awaited = reference.act_and_mul(reference.fused_add_rms_norm(x.clone(), delta, weight, 1e-5), gelu=True)
    graph.replay()
    torch.testing.assert_close(result, awaited)
