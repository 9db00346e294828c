"""Adapters that PEFT saved, with all of LoRA's options, compared with what PEFT loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, Adapter, load_adapter
from adapters.base.weights import BaseWeights
from tests.adapters.artifact.folders import LIMITS, layout_of, tiny_llama
from tests.support.tiny_models import make_peft_adapter

UNSLOTH_REGEX = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|up_proj)))"
)

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

CASES: dict[str, dict[str, Any]] = {
    "all linears": {"target_modules": "all-linear"},
    "suffixes": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "a full name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.layers\.\d+\.self_attn\.[kv]_proj"},
    "Unsloth's regex": {"target_modules": UNSLOTH_REGEX},
    "excluded names": {
        "target_modules": "all-linear",
        "exclude_modules": ["up_proj", "layers.0.mlp.down_proj"],
    },
    "excluded regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "ranks": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"0.*q_proj": 2, r"layers\.1\..*": 12},
    },
    "alphas": {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"^model.layers.0.mlp.up_proj": 5}},
    "rank-stabilised": {"target_modules": ["k_proj"], "use_rslora": True, "rank_pattern": {"0.*k_proj": 3}},
    "fan in, fan out": {"target_modules": ["gate_proj"], "fan_in_fan_out": True},
    "odd alpha": {"target_modules": ["gate_proj"], "lora_alpha": 7, "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def _expected(model: Any, folder: Path) -> Pairs:
    """The LoRA pairs in PEFT after it loads the folder, with B scaled and transposed."""
    peft = PeftModel.from_pretrained(model, folder)
    pairs = {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach(),
            (layer.lora_B["default"].weight.detach() * layer.scaling["default"]).t(),
        )
        for name, layer in peft.named_modules()
        if hasattr(layer, "lora_A")
    }
    peft.unload()
    return pairs


def _check_equal(adapter: Adapter, expected: Pairs, dtype: torch.dtype) -> None:
    assert adapter.weights.keys() == expected.keys() == adapter.info.ranks.keys()
    for name, (a, b) in expected.items():
        pair = adapter.weights[name]
        assert torch.equal(pair.a, a.to(dtype))
        assert torch.equal(pair.b, b.to(dtype))
        assert pair.a.is_contiguous()
        assert pair.b.is_contiguous()
        assert adapter.info.ranks[name] == a.shape[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_equals_what_peft_loads(case: str, model: Any, tmp_path: Path) -> None:
    folder = make_peft_adapter(model, tmp_path / "a", **CASES[case])
    adapter = load_adapter(folder, layout_of(model), LIMITS)
    _check_equal(adapter, _expected(model, folder), torch.bfloat16)
    assert adapter.info.nbytes == sum(p.a.nbytes + p.b.nbytes for p in adapter.weights.values())
    assert adapter.info.rank == max(adapter.info.ranks.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "labels",
    [
        {"task_type": "SEQ_2_SEQ_LM"},
        {"task_type": None},
        {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2.0}},
        {"merge_weights": True, "enable_lora": None, "inference_mode": False},
        {"r": None, "lora_alpha": None},
    ],
    ids=", ".join,
)
def test_labels_change_nothing(labels: dict[str, Any], model: Any, tmp_path: Path) -> None:
    folder = make_peft_adapter(model, tmp_path / "a", target_modules=["q_proj", "up_proj"])
    config = json.loads((folder / CONFIG_FILE).read_text())
    changed = {k: v for k, v in {**config, **labels}.items() if k == "task_type" or v is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(changed))
    _check_equal(load_adapter(folder, layout_of(model), LIMITS), _expected(model, folder), torch.bfloat16)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_without_tensors_stay_as_in_the_base(
    fields: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    folder = make_peft_adapter(model, tmp_path / "a", **fields)
    weights = load_file(folder / WEIGHTS_FILE)
    save_file({name: t for name, t in weights.items() if ".layers.0." not in name}, folder / WEIGHTS_FILE)
    layout = layout_of(model)
    adapter = load_adapter(folder, layout, LIMITS, torch.float32, base=BaseWeights(model, layout))
    assert set(adapter.info.ranks) == {name for name in layout.sites if ".layers.1." in name}
    assert adapter.extras.adjustments.keys() <= adapter.info.ranks.keys()
    (warning,) = adapter.info.warnings
    assert warning.startswith(
        "7 of the modules that target_modules selects have no tensors and stay as in the"
    )
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval().base_model.model
    with torch.inference_mode():
        for name, site in layout.sites.items():
            x = torch.randn(3, site.in_features)
            if name in adapter.info.ranks:
                assert not torch.allclose(theirs.get_submodule(name)(x), model.get_submodule(name)(x))
            else:
                torch.testing.assert_close(theirs.get_submodule(name)(x), model.get_submodule(name)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_serving_dtype_is_the_callers(dtype: torch.dtype, model: Any, tmp_path: Path) -> None:
    folder = make_peft_adapter(model, tmp_path / "a", target_modules=["v_proj"])
    _check_equal(load_adapter(folder, layout_of(model), LIMITS, dtype), _expected(model, folder), dtype)


def test_a_saved_half_precision_adapter_is_read(model: Any, tmp_path: Path) -> None:
    half = tiny_llama().to(torch.bfloat16)
    folder = make_peft_adapter(half, tmp_path / "a", target_modules=["q_proj"], lora_alpha=3)
    adapter = load_adapter(folder, layout_of(model), LIMITS)
    _check_equal(adapter, _expected(model, folder), torch.bfloat16)
