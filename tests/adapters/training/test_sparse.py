"""Training on a sparse base: gradients flow through its frozen NF4 experts, and the adapter can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.artifact import Limits, inspect_adapter
from adapters.base import load_base, prepare_base
from adapters.errors import RecipeInvalid
from tests.support.training_tasks import make_task, run_in


@pytest.mark.parametrize("unpacked", ["on", "off"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_it_learns_and_the_adapter_is_servable(family: str, unpacked: Any, tmp_path: Path) -> None:
    task = make_task(tmp_path, family)
    done = run_in(tmp_path / "run", task, cache_dequantized=unpacked, gradient_checkpointing="on")
    assert done.folder is not None
    assert done.metrics["train_loss"] < 3.5
    base = load_base(prepare_base(task["base"], task["home"], progress=False))
    info = inspect_adapter(done.folder, base.layout, Limits(64, 1 << 20), torch.bfloat16)
    assert {name for name in base.layout.sites if "self_attn" in name} <= set(info.ranks)


def test_modules_that_peft_takes_for_experts_are_refused(tmp_path: Path) -> None:
    task = make_task(tmp_path, "deepseek_v2")
    with pytest.raises(RecipeInvalid, match="PEFT adapts experts"):
        run_in(tmp_path / "run", task, target_modules=("q_b_proj", "gate_proj", "up_proj"))
