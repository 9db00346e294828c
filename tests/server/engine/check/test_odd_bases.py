"""Architectures that were once served wrong. Each is served correctly, or refused by name at the start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterUnsupported, BaseModelError
from server.engine.model.made_up import warming_steps
from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_models import GEMMA3, PHI3, make_peft_adapter, make_tiny_model

LLAMA4: dict[str, Any] = {"num_local_experts": 4, "head_dim": 16, "attention_chunk_size": 100}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
    "minimax": (
        "minimax",
        {"num_local_experts": 4, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        "layers of the kind linear_attention",
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16},
        "layers of the kind linear_attention",
    ),
    "llama4 with chunks": ("llama4_text", LLAMA4, "with more than 100 tokens: .*--max-model-len 100"),
    "llama4 with long sequences": (
        "llama4_text",
        {**LLAMA4, "layer_types": ["full_attention"] * 2, "floor_scale": 64},
        "with more than 63 tokens: .*--max-model-len 63",
    ),
    "zaya": ("zaya", {}, "layers of the kind hybrid"),
    "roberta": ("roberta", {"is_decoder": True}, "wrong even alone"),
    "xlm-roberta": ("xlm-roberta", {"is_decoder": True}, "wrong even alone"),
    "doge": ("doge", {}, "a mask of its own"),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"], "num_local_experts": 4},
        "layers of the kind linear_attention",
    ),
}
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "phimoe with a window": ("phimoe", {"num_local_experts": 4, "sliding_window": 16}),
    "afmoe": (
        "afmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention", "full_attention"]},
    ),
    "granitemoehybrid without mamba": (
        "granitemoehybrid",
        {"layer_types": ["attention", "attention"], "num_local_experts": 4},
    ),
    "gemma3": ("gemma3_text", {}),
    "diffllama": ("diffllama", {}),
    "hrm_text": ("hrm_text", {}),
    "gemma3 with images": ("gemma3", GEMMA3),
    "phi3 with LongRoPE": ("phi3", PHI3),
    "longcat_flash": (
        "longcat_flash",
        {
            "head_dim": 16,
            "num_key_value_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    "gpt2": ("gpt2", {}),
}


def _model(family: str, fields: dict[str, Any], home: Path) -> Path:
    return make_tiny_model(family, home / "model", **fields)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_with_the_reason(case: str, tmp_path: Path) -> None:
    family, fields, reason = REFUSED[case]
    with pytest.raises(BaseModelError, match=rf"\({family}\) cannot be served.*{reason}"):
        build(_model(family, fields, tmp_path), tmp_path, "--quantization", "none")


@pytest.mark.parametrize("case", SERVED)
def test_it_is_served_as_transformers_computes_it(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    build(_model(*SERVED[case], tmp_path), tmp_path, "--quantization", "none").close()
    assert "checked against transformers" in caplog.text


@pytest.mark.parametrize("case", ["phimoe", "llama4"])
def test_an_adapter_on_a_router_is_refused_when_it_is_registered(case: str, tmp_path: Path) -> None:
    family, fields = SERVED[case]
    parts = build(_model(family, fields, tmp_path), tmp_path, "--quantization", "none")
    routers = [name for name in parts.base.layout.unservable if name.endswith("router")]
    assert len(routers) == 2
    for name, modules in {"good": ["q_proj"], "bad": ["q_proj", "router"]}.items():
        make_peft_adapter(tmp_path / "model", tmp_path / name, target_modules=modules)
    parts.registry.register_outside("good", tmp_path / "good", replace=False)
    with pytest.raises(AdapterUnsupported, match=r"router.*returns more than a linear's output"):
        parts.registry.register_outside("bad", tmp_path / "bad", replace=False)
    driver = Driver(parts)
    asked = Asked([5, 6, 7, 8], "good")
    driver.run(asked, Asked([9, 10]))
    assert asked.error is None
    assert asked.tokens
    parts.close()


def test_a_config_of_several_models_is_warmed_up(tmp_path: Path) -> None:
    """Only a GPU warms up. The steps are those of the config's text model."""
    parts = build(_model("gemma3", GEMMA3, tmp_path), tmp_path, "--quantization", "none")
    for step in warming_steps(parts.base.model.config, 8, 16):
        assert parts.model(step).isfinite().all()
    parts.close()


@pytest.mark.parametrize("length", [100, 80])
def test_chunked_attention_is_served_up_to_a_chunk(length: int, tmp_path: Path) -> None:
    folder = _model("llama4_text", LLAMA4, tmp_path)
    parts = build(folder, tmp_path, "--quantization", "none", "--max-model-len", str(length))
    assert parts.info.max_model_len == length
    parts.close()


def test_steps_that_would_scale_attention_are_refused(tmp_path: Path) -> None:
    folder = _model("llama4_text", {**LLAMA4, "floor_scale": 64}, tmp_path)
    short = ["--quantization", "none", "--max-model-len", "50"]
    with pytest.raises(BaseModelError, match="--max-num-batched-tokens 128; give 63 at most"):
        build(folder, tmp_path, *short)
    build(folder, tmp_path, *short, "--max-num-batched-tokens", "63", "--max-num-seqs", "4").close()
