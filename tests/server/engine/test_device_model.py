"""The fused step of a GPU with torch's arithmetic in place of its kernels, which are tested by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.base import load_base, prepare_base
from adapters.base.checkpoint import Quantization
from adapters.rank_pool import RankPool
from server.engine import kernels
from server.engine.model.device import DeviceModel
from server.engine.model.made_up import warming_steps
from server.engine.model.stock import StockModel
from tests.server.engine.gpu_path import CPU, SEATS, pretend
from tests.server.engine.test_exactness import FAMILIES, compare_with_peft
from tests.tiny_models import Family, make_tiny_model

TOLERANCE = 0.15
"""Wider than transformers' blocks need: a fused operation is rounded once where theirs is thrice."""


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(
    family: Family, quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    parts = compare_with_peft(family, tmp_path, quantization, TOLERANCE)
    assert isinstance(parts.model, DeviceModel)


class Refused:
    """A graph that the driver does not record."""

    def capture(self, _: Callable[[], Tensor]) -> Tensor:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand a trace")

    def replay(self) -> None: ...


class Wrong:
    """A graph that computes something else."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self._result = run()
        return self._result

    def replay(self) -> None:
        self._result.uniform_(-3, 3)


@pytest.mark.parametrize(
    ("graph", "told"), [(Refused, "raised RuntimeError (CUDA error: operation not"), (Wrong, "are off by ")]
)
def test_graphs_that_fail_or_are_wrong_are_not_used(
    graph: type[Refused | Wrong],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretend(monkeypatch)
    folder = make_tiny_model("llama", tmp_path / "llama")
    base = load_base(prepare_base(str(folder), tmp_path, "none", progress=False))
    pool = RankPool(base.layout.sites, 16, torch.bfloat16)
    model = DeviceModel(StockModel(base, pool), pool, kernels.choose(CPU), SEATS, graph)
    model.allocate(8, 16)
    model.warm_up()
    assert told in caplog.text
    assert model.name == "fused on the device"
    assert model(warming_steps(base.model.config, 8, 16)[1]).isfinite().all()
