"""Linears stay readable for the model's own code when they are wrapped."""

from __future__ import annotations

from pathlib import Path

from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_zoo import save_tiny_model


def test_a_model_may_read_the_weight_of_a_linear(tmp_path: Path) -> None:
    """HunYuan's gate asks for its linear's dtype. Every request for such a base once failed."""
    folder = save_tiny_model("hunyuan_v1_moe", tmp_path / "model")
    asked = Asked([5, 6, 7], params={"ignore_eos": True})
    Driver(build(folder, tmp_path)).run(asked)
    assert asked.error is None
    assert len(asked.tokens) == 8
