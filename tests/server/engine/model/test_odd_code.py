"""Models whose code uses linears, attention functions or configs in unusual ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.engine.build import Parts
from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_zoo import save_tiny_model


def served(model_type: str, home: Path) -> Parts:
    """The parts of a tiny model, after the check at the start and one request."""
    parts = build(save_tiny_model(model_type, home / "model"), home)
    asked = Asked([5, 6, 7], params={"ignore_eos": True})
    Driver(parts).run(asked)
    assert asked.error is None
    assert len(asked.tokens) == 8
    return parts


@pytest.mark.parametrize(
    "model_type",
    [
        "hunyuan_v1_moe",  # its gate reads the dtype of a linear's weight
        "afmoe",  # it passes the mask by name
        "dbrx",  # its sub-configs are not models and have no attention
        "got_ocr2",  # the outer model keeps its own attention, and its text model uses ours
    ],
)
def test_it_is_served(model_type: str, tmp_path: Path) -> None:
    served(model_type, tmp_path)


def test_the_end_of_a_composite_base_leaves_other_models_alone(tmp_path: Path) -> None:
    """transformers' own attention function was once replaced by None for all models of the process."""
    served("got_ocr2", tmp_path).close()
    gone = [name for name, function in ALL_ATTENTION_FUNCTIONS.items() if function is None]
    assert [name for name in gone if not name.startswith("manylora-")] == []
