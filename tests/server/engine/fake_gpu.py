"""Runs the engine's GPU code on a CPU. torch operations replace the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor

import server.engine.model as model_package
from adapters.kernels import Segment
from adapters.kernels.segmented import segmented_lora
from adapters.kernels.triton import TritonLora
from adapters.pool.site_pool import SitePool
from server.engine import kernels
from server.engine.attention import AttentionSpec
from server.engine.attention.flash_metadata import FlashMetadata
from server.engine.attention.flash_paged import FlashPaged
from server.engine.model import transformers_model
from server.engine.model.cuda import graphs
from server.engine.model.cuda.graphs import Graph

CPU = torch.device("cpu")
GRAPH_BATCH = 6
"""The most sequences in a step that runs as a graph."""


class SegmentedTogether(TritonLora):
    """``TritonLora`` that computes with torch."""

    def prepare(self, segments: list[Segment], graph_tokens: int | None = None) -> None: ...

    def foreach(
        self, ys: Sequence[Tensor], x: Tensor, pools: Sequence[SitePool], segments: list[Segment]
    ) -> None:
        for y, pool in zip(ys, pools, strict=True):
            segmented_lora(y, x, pool, segments)


class MaskedPaged:
    """A ``PagedKernel`` that reads whole tables and applies a mask. Its operations are always the same."""

    name = "masked"

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        tokens = torch.arange(len(q))
        owner = torch.searchsorted(metadata.query_starts[1:].long(), tokens, right=True)
        position = metadata.lengths[owner] - metadata.query_starts[owner + 1] + tokens
        age = position[:, None] - torch.arange(metadata.tables.shape[1] * keys.shape[1])
        unseen = (age < 0) | (age >= (spec.window or 1 << 30))
        tables = metadata.tables[owner].long().clamp(0, len(keys) - 1)
        group = q.shape[1] // keys.shape[2]
        k, v = (p[tables].flatten(1, 2).float().repeat_interleave(group, dim=2) for p in (keys, values))
        scores = torch.einsum("thd,tnhd->thn", q.float(), k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        shares = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("thn,tnhd->thd", shares, v).to(q.dtype)


def _paged(
    _shapes: object,
    _kinds: object,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
) -> FlashPaged:
    return FlashPaged(MaskedPaged(), block_size, device, dtype, max_length)


def pretend(monkeypatch: pytest.MonkeyPatch, new_graph: Callable[[], Graph] | None = None) -> None:
    """Make new models use the GPU's code. With graphs, Triton's interpreter runs the kernels."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    if new_graph is None:
        monkeypatch.setattr(transformers_model, "choose_lora", lambda *_: SegmentedTogether(CPU))
    else:
        monkeypatch.setattr(transformers_model, "choose_lora", lambda *_: TritonLora(CPU))
        monkeypatch.setattr(kernels, "choose", lambda _: import_module("server.engine.kernels.triton"))
        monkeypatch.setattr(graphs, "cuda_graphs", lambda: new_graph)
    monkeypatch.setattr(transformers_model, "choose_attention", _paged)
    monkeypatch.setattr(
        model_package,
        "_build_cpu_model",
        lambda of, pool, block_size, _: model_package._build_cuda_model(
            of, pool, block_size, GRAPH_BATCH, new_graph is None
        ),
    )
