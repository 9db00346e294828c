"""The fused step of a GPU with torch's arithmetic in place of its kernels, which are tested by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base.checkpoint import Quantization
from server.engine.model.device import DeviceModel
from tests.server.engine.gpu_path import pretend
from tests.server.engine.test_exactness import FAMILIES, compare_with_peft
from tests.tiny_models import Family

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
