"""Training on bases with unusual linears: what is trained can be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.base import LoadedBase, load_base, prepare_base
from adapters.errors import RecipeInvalid
from adapters.training import TrainConfig
from adapters.training.export import pairs_of
from adapters.training.methods import add_adapter
from adapters.training.recipe import ALL_LINEAR
from tests.support.tiny_zoo import save_tiny_model


def tiny(model_type: str, home: Path) -> LoadedBase:
    folder = save_tiny_model(model_type, home / "model")
    return load_base(prepare_base(str(folder), home, progress=False))


def adapted(base: LoadedBase, *names: str) -> set[str]:
    """The endings of the linears that training adapts."""
    config = TrainConfig(data=Path(), r=2, target_modules=names or ALL_LINEAR)
    return {name.rpartition(".")[2] for name in pairs_of(add_adapter(base.model, config, 1, base.layout))}


@pytest.mark.parametrize(
    ("model_type", "linears"),
    [
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # PEFT's all-linear adds the experts
        ("phimoe", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # ... and the router, which returns a tuple
        ("bert", {"query", "key", "value", "dense"}),  # ... and the dense linear of the head
        ("fuyu", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),  # ... and images' linear
    ],
)
def test_all_linear_stands_for_the_linears_that_can_be_served(
    model_type: str, linears: set[str], tmp_path: Path
) -> None:
    base = tiny(model_type, tmp_path)
    assert adapted(base) == linears


def test_the_dense_linear_of_a_head_gets_no_adapter(tmp_path: Path) -> None:
    base = tiny("bert", tmp_path)
    pairs = pairs_of(add_adapter(base.model, TrainConfig(data=Path(), r=2), 1, base.layout))
    assert not any(name.startswith("cls.") for name in pairs)


def test_linears_that_cannot_be_served_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny("phimoe", tmp_path)
    with pytest.raises(
        RecipeInvalid, match=r"layers\.0\.mlp\.router cannot be served, because it returns more"
    ):
        adapted(base, "q_proj", "router")


def test_names_that_peft_takes_for_experts_are_refused(tmp_path: Path) -> None:
    base = tiny("deepseek_v2", tmp_path)
    with pytest.raises(
        RecipeInvalid, match=r"PEFT adapts experts \(.*gate_up_proj.*\), which cannot be served"
    ):
        adapted(base, "q_a_proj", "gate_proj", "up_proj", "down_proj")
    assert adapted(tiny("deepseek_v2", tmp_path), "q_a_proj", "o_proj") == {"q_a_proj", "o_proj"}


def test_all_linear_leaves_out_names_that_peft_takes_for_experts(tmp_path: Path) -> None:
    trained = adapted(tiny("deepseek_v2", tmp_path))
    assert {"q_a_proj", "o_proj"} < trained
    assert "gate_proj" not in trained
