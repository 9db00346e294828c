"""Training never mixes rows. In every family the loss of rows in one step equals that of each row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.base import load_base, prepare_base
from adapters.base.unpack import four_bit_linears
from adapters.errors import RecipeInvalid
from adapters.training.attention import use_packed_attention
from adapters.training.isolation import BOUND, keep_rows_separate, mixing
from adapters.training.packing import Pack, collate
from adapters.training.recipe import TrainConfig
from tests.adapters.training.examples import example
from tests.support.tiny_models import FAMILIES, make_tiny_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
SEPARATE: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "cohere2": WINDOW,
    "glm4": {"head_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], **LOCAL_EXPERTS},
    "llama4_text": {"head_dim": 16, "layer_types": ["full_attention", "full_attention"], **LOCAL_EXPERTS},
    "mixtral": LOCAL_EXPERTS,
    "olmo2": {},
    "phimoe": LOCAL_EXPERTS,
    "qwen3_moe": {"head_dim": 32, **EXPERTS},
    "starcoder2": {},
}
"""Families whose rows are separate with the packed attention."""
WITH_OWN_ATTENTION: dict[str, dict[str, Any]] = {"stablelm": {}, "nemotron": {}, "doge": {}}
"""Families that do not pass the bounds of rows to their attention, or the mask by position."""
ONE_ROW_AT_A_TIME: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {},
    "gpt_oss": {"head_dim": 16, **LOCAL_EXPERTS, **WINDOW},
    "mpt": {},
}
"""Families whose masks ignore where rows begin."""


def _model(family: str, fields: dict[str, Any], folder: Path) -> Any:
    path = make_tiny_model(family, folder / "model", **fields)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _config(**fields: Any) -> TrainConfig:
    return TrainConfig(data=Path("rows.jsonl"), **fields)


def _total_loss(model: Any, packs: list[Pack]) -> float:
    """The sum of the loss over the learnt tokens of one step, with one pass for each pack."""
    total = 0.0
    for pack in packs:
        batch = collate([pack])
        with torch.no_grad():
            total += model(**batch, use_cache=False).loss.item() * batch["labels"].numel()
    return total


def _check_losses(model: Any, batch_size: int) -> None:
    rows = [example(length, length) for length in (20, 5, 33, 41)]
    together = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
    alone = _total_loss(model, [[row] for row in rows])
    assert _total_loss(model, together) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", SEPARATE)
def test_rows_are_separate_with_the_packed_attention(family: str, tmp_path: Path) -> None:
    model = _model(family, SEPARATE[family], tmp_path)
    own = model.config._attn_implementation
    use_packed_attention(model)
    config, change = keep_rows_separate(model, own, _config(batch_size=4, packing=True), 64)
    assert (config.batch_size, change) == (4, None)
    _check_losses(model, 4)


@pytest.mark.parametrize("family", WITH_OWN_ATTENTION)
def test_the_models_own_attention_is_used_where_only_it_separates_rows(family: str, tmp_path: Path) -> None:
    model = _model(family, WITH_OWN_ATTENTION[family], tmp_path)
    own = model.config._attn_implementation
    use_packed_attention(model)
    config, change = keep_rows_separate(model, own, _config(batch_size=4, packing=True), 64)
    assert config.batch_size == 4
    assert change is not None
    assert "only with transformers' own attention" in change
    assert model.config._attn_implementation == own
    _check_losses(model, 4)


@pytest.mark.parametrize(("longest", "is_used"), [(64, True), (16, False)])
def test_a_window_that_the_mask_does_not_have_is_not_used(
    longest: int, is_used: bool, tmp_path: Path
) -> None:
    """Phi-3.5-MoE states a window, but transformers' mask for it has none."""
    model = _model("phimoe", {"sliding_window": 16, **LOCAL_EXPERTS}, tmp_path)
    own = model.config._attn_implementation
    row = torch.randint(500, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(row, use_cache=False).logits
    use_packed_attention(model)
    keep_rows_separate(model, own, _config(), longest)
    assert (model.config._attn_implementation == own) == is_used
    if is_used:
        with torch.no_grad():
            torch.testing.assert_close(model(row, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ONE_ROW_AT_A_TIME)
def test_rows_that_would_mix_run_one_by_one(family: str, tmp_path: Path) -> None:
    model = _model(family, ONE_ROW_AT_A_TIME[family], tmp_path)
    own = model.config._attn_implementation
    use_packed_attention(model)
    assert mixing(model) > 2 * BOUND
    with pytest.raises(RecipeInvalid, match="mix the rows of a pack; leave out --packing"):
        keep_rows_separate(model, own, _config(packing=True), 64)
    config, change = keep_rows_separate(model, own, _config(batch_size=4, accumulation=2), 64)
    assert (config.batch_size, config.accumulation) == (1, 8)
    assert change is not None
    assert "a step has 8 passes" in change
    _check_losses(model, config.batch_size)
    assert keep_rows_separate(model, own, config, 64) == (config, None)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}),
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16}),
    ],
)
def test_recurrent_state_is_found(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = _model(family, fields, tmp_path)
    use_packed_attention(model)
    assert mixing(model) > BOUND


def test_four_bit_weights_stay_as_they_are(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "base")
    model = load_base(prepare_base(str(folder), tmp_path / "home", progress=False)).model
    before = {name: linear.weight.data.clone() for name, linear in four_bit_linears(model).items()}
    assert mixing(model) == 0
    for name, linear in four_bit_linears(model).items():
        assert torch.equal(linear.weight.data, before[name])
        assert not linear.training


def test_out_of_memory_is_not_taken_for_mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama", {}, tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        keep_rows_separate(model, "sdpa", _config(), 64)
