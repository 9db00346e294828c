"""The GPU's fused step with torch operations in place of its kernels. Other tests cover the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.base import LoadedBase, load_base, prepare_base
from adapters.base.checkpoint import Quantization
from adapters.pool.rank_pool import RankPool
from server.engine import kernels
from server.engine.model.cuda import model as device
from server.engine.model.cuda.model import CudaModel
from server.engine.model.cuda.products import Choice, Nf4Weight
from server.engine.model.llama_like import rotary_angles
from server.engine.model.made_up import warming_steps
from server.engine.model.transformers_model import TransformersModel
from tests.server.engine.fake_gpu import CPU, GRAPH_BATCH, pretend
from tests.support.exactness import compare_with_peft
from tests.support.tiny_models import FAMILIES, Family, make_tiny_model

TOLERANCE = 0.15
"""Larger than for transformers' blocks: they round three times where a fused operation rounds once."""


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(
    family: Family, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    parts = compare_with_peft(family, tmp_path, quantization, TOLERANCE)
    assert isinstance(parts.model, CudaModel)


class OutOfResources(Exception):
    """Like Triton's error, which is not a RuntimeError."""


class Refused:
    """A graph that the driver refuses to record."""

    def capture(self, _: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand a trace")

    def replay(self) -> None: ...


class TooLarge(Refused):
    """A graph with a kernel that needs more shared memory than the GPU has."""

    def capture(self, _: Callable[[], Tensor]) -> Tensor:
        raise OutOfResources("out of resource: shared memory")


class Wrong:
    """A graph with wrong results."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self._result = run()
        return self._result

    def replay(self) -> None:
        self._result.uniform_(-3, 3)


@pytest.mark.parametrize(
    ("graph", "told"),
    [
        (Refused, "raised RuntimeError (CUDA error: operation not"),
        (TooLarge, "raised OutOfResources (out of resource"),
        (Wrong, "are off by "),
    ],
)
def test_graphs_that_fail_or_are_wrong_are_not_used(
    graph: type[Refused | Wrong],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, base = _device_model(tmp_path, monkeypatch, "none", graph)
    model.warm_up()
    assert told in caplog.text
    assert told in model.fallbacks[0]
    assert model.name == "fused on the device"
    assert model(warming_steps(base.model.config, 8, 16)[1]).isfinite().all()


def test_our_product_being_refused_is_a_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(weights: Sequence[Nf4Weight], _: object) -> dict[tuple[int, int], Choice]:
        choices = {(weight.outputs, weight.inputs): Choice() for weight in weights}
        return choices | {(weights[0].outputs, weights[0].inputs): Choice((), "it is off by 1.000")}

    monkeypatch.setattr(device, "stopwatch", lambda *_, **__: nullcontext(True))
    monkeypatch.setattr(device, "choose_by_shape", refused)
    model, _ = _device_model(tmp_path, monkeypatch, "nf4", None)
    model.warm_up()
    assert "off by 1.000" in model.fallbacks[0]
    assert len(model.fallbacks) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_size_of_the_rotary_tables_is_known_in_advance(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = _device_model(tmp_path, monkeypatch, "none", None, family)
    kept = {id(table): table.nbytes for tables in model._angles for table in tables}
    assert sum(kept.values()) == 8 * 16 * model.bytes_a_position
    for tables, whole in zip(rotary_angles(base.model, 128, at_once=7), model._angles, strict=True):
        assert all(map(torch.equal, tables, whole))


def _device_model(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization,
    graph: type[Refused | Wrong] | None,
    family: Family = "llama",
) -> tuple[CudaModel, LoadedBase]:
    """A fused GPU model on the CPU with pages for 128 tokens."""
    pretend(monkeypatch)
    folder = make_tiny_model(family, home / "base")
    base = load_base(prepare_base(str(folder), home, quantization, progress=False))
    pool = RankPool(base.layout.sites, 16, torch.bfloat16)
    model = CudaModel(TransformersModel(base, pool), pool, kernels.choose(CPU), GRAPH_BATCH, graph)
    model.allocate(8, 16)
    return model, base
