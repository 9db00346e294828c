"""``--hf-overrides`` changes what is computed, and refuses what it cannot change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, GPT2Config, Qwen2Config

from adapters.base import load_base, prepare_base
from adapters.base.context import own_length
from adapters.base.outline import outline_of
from adapters.base.overrides import apply_overrides
from adapters.errors import BaseModelError
from tests.support.tiny_models import make_tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0}
QWEN = Qwen2Config(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=128,
)
GPT2 = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=96)
GEMMA3 = Gemma3Config(
    text_config={
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
    vision_config={
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
)


def changed(config: Any, fields: Any) -> Any:
    return apply_overrides(config, json.dumps(fields)).get_text_config()


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"max_position_embeddings": 300}, 300),
        ({"rope_scaling": YARN}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 512),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": YARN, "max_position_embeddings": 512}, 512),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 150}, 150),
        ({"rope_theta": 5e5}, 128),
    ],
)
def test_the_context_follows(fields: dict[str, Any], length: int) -> None:
    assert own_length(changed(QWEN, fields)) == length


def test_another_type_of_rope_keeps_theta_and_takes_the_length_before() -> None:
    theta = changed(QWEN, {"rope_theta": 5e5})
    rope = changed(theta, {"rope_scaling": YARN, "max_position_embeddings": 512}).rope_parameters
    assert rope == {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 128}


def test_one_type_of_layer_changes() -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}}
    new = changed(GEMMA3, {"text_config": {"rope_parameters": rope}}).rope_parameters
    old = GEMMA3.text_config.rope_parameters
    assert new["sliding_attention"] == old["sliding_attention"]
    assert new["full_attention"] == {**rope["full_attention"], "rope_theta": 1e6}


def test_windows_change_with_the_types_of_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    fields = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    config = changed(QWEN, fields)
    assert (config.sliding_window, config.layer_types) == (8, kinds)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            QWEN,
            {"max_position_embedings": 9},
            "no field 'max_position_embedings'; did you mean 'max_position_emb",
        ),
        (QWEN, {"max_position_embeddings": "9"}, "max_position_embeddings is '9', and must be a number"),
        (QWEN, {"max_position_embeddings": 0}, "max_position_embeddings is 0, and must be over 0"),
        (QWEN, {"max_position_embeddings": None}, "expected int, got NoneType"),
        (QWEN, {"use_cache": 1}, "use_cache is 1, and must be true or false"),
        (QWEN, {"hidden_act": "nope"}, "no model can be made .*'nope'"),
        (QWEN, {"hidden_size": 32}, r"embed_tokens.weight would be \[96, 32\], and it is \[96, 64\]"),
        (QWEN, {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "would be absent, and it is"),
        (QWEN, {"model_type": "llama"}, "model_type tells what the base's files contain"),
        (QWEN, {"quantization_config": {}}, "quantization_config tells what"),
        (QWEN, {"_attn_implementation": "eager"}, "_attn_implementation tells what"),
        (QWEN, {"sliding_window": 8}, "sets sliding_window to None by other fields"),
        (QWEN, {"sliding_window": 8, "use_sliding_window": True}, "use_sliding_window has no effect"),
        (QWEN, {"rope_scaling": None}, "rope_scaling is None, and must be an object"),
        (QWEN, {"rope_scaling": {"rope_type": "yarm"}}, "rope_type is 'yarm', and must be one of default, "),
        (QWEN, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling has no factor; yarn needs one"),
        (QWEN, {"rope_scaling": {**YARN, "facter": 2}}, "facter is not a parameter .* mean 'factor'"),
        (QWEN, {"rope_scaling": {**YARN, "factor": 0.5}}, "factor is 0.5, and must be a number, at least 1"),
        (QWEN, {"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1, and must be true or false"),
        (QWEN, {"rope_theta": -1.0}, "rope_theta is -1.0, and must be a number over 0"),
        (QWEN, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            QWEN,
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": []}},
            "long_factor is .*, and must be a list of numbers",
        ),
        (GPT2, {"rope_scaling": YARN}, "GPT2Config has no field 'rope_parameters'"),
        (GPT2, {"n_positions": 2048}, r"wpe.weight would be \[2048, 32\]"),
        (GEMMA3, {"max_position_embeddings": 9}, 'give {"text_config": {"max_position_embeddings": …}}'),
        (GEMMA3, {"text_config": 9}, "text_config is 9, and must be an object"),
        (
            GEMMA3,
            {"text_config": {"rope_scaling": YARN}},
            "each type of layer; .*sliding_attention, full_att",
        ),
    ],
)
def test_refusals_name_the_field(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        changed(config, fields)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_computes_with_the_fields(quantization: Any, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "model", max_position_embeddings=32)
    plain = prepare_base(str(folder), tmp_path, quantization, progress=False)
    fields = json.dumps({"rope_scaling": YARN})
    prepared = prepare_base(str(folder), tmp_path, quantization, progress=False, hf_overrides=fields)
    assert (prepared.path, prepared.source) == (plain.path, plain.source)
    assert prepared.digest != plain.digest

    tokens = torch.arange(3, 103)[None]
    config = AutoConfig.from_pretrained(plain.path)
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **YARN}
    expected = AutoModelForCausalLM.from_pretrained(plain.path, config=config, dtype=torch.bfloat16)
    with torch.no_grad():
        base = load_base(prepared).model
        torch.testing.assert_close(base(tokens).logits, expected.eval()(tokens).logits)
        assert (base(tokens).logits - load_base(plain).model(tokens).logits).abs().max() > 0.1
    assert outline_of(prepared).context == 128
    assert outline_of(plain).context == 32


def test_refused_before_the_base_is_quantised(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    with pytest.raises(BaseModelError, match="no field 'rope'"):
        prepare_base(str(folder), tmp_path, progress=False, hf_overrides='{"rope": 1}')
    assert not (tmp_path / "bases").exists()
