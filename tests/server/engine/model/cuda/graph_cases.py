"""Decoding in recorded graphs, with Triton's kernels interpreted.

pytest does not collect this file: ``test_interpreted.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels import triton
from server.engine.kernels import nf4
from server.engine.model import made_up
from server.engine.model.cuda import graphs
from server.engine.model.cuda import model as device
from server.engine.model.cuda.graphs import DecodeGraphs
from server.engine.model.cuda.products import OURS, ROWS, Choice, Nf4Weight
from tests.server.engine.fake_gpu import GRAPH_BATCH, pretend
from tests.server.engine.model.cuda.fake_cuda_graph import RecordedGraph
from tests.support.exactness import Plan, compare_with_peft

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has real graphs")

PLAN: Plan = [("everywhere", 2), (None, 5), ("attention", 3), ("mixed-ranks", 4)]


def test_decoding_in_graphs_equals_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters and the base, in graphs that were recorded without adapters, with our NF4 product."""
    replays: list[tuple[int, bool]] = []
    places: set[int] = set()
    replay = DecodeGraphs.replay

    def noted(self: DecodeGraphs, graph_batch_size: int, adapted: bool) -> torch.Tensor:
        replays.append((graph_batch_size, adapted))
        places.update(result.untyped_storage().data_ptr() for _, result in self._graphs.values())
        return replay(self, graph_batch_size, adapted)

    def ours(weights: Sequence[Nf4Weight], _: object) -> dict[tuple[int, int], Choice]:
        return {(weight.outputs, weight.inputs): Choice([OURS] * len(ROWS)) for weight in weights}

    multiplied: list[int] = []
    product = nf4.product

    def counted(x: torch.Tensor, *weight: Any) -> torch.Tensor:
        multiplied.append(len(x))
        return product(x, *weight)

    monkeypatch.setattr(nf4, "product", counted)
    monkeypatch.setattr(nf4, "_multiprocessors", lambda _: 8)  # K in parts
    monkeypatch.setattr(nf4, "_FEWEST_TILES", 1)
    monkeypatch.setattr(device, "stopwatch", lambda *_, **__: nullcontext(True))
    monkeypatch.setattr(device, "choose_by_shape", ours)
    monkeypatch.setattr(DecodeGraphs, "replay", noted)
    monkeypatch.setattr(graphs, "graph_batch_sizes", lambda most: [most // 2, most])
    monkeypatch.setattr(made_up, "_WARM_TOKENS", 8)
    monkeypatch.setattr(triton, "_PROGRAMS", 8)  # the interpreter runs programs one by one
    pretend(monkeypatch, RecordedGraph)
    compare_with_peft("llama", tmp_path, tolerance=0.15, plan=PLAN)
    assert replays.count((GRAPH_BATCH, True)) > 5
    assert len(places) == 1, "the graphs must share one buffer of logits"
    assert GRAPH_BATCH in multiplied, "the graphs must use our NF4 product"
