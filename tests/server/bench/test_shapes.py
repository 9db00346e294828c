from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.bench.errors import BenchError
from server.bench.shapes import SHAPES, fill_vocabulary, make_model
from tests.support.tiny_models import TinyBase

SMALL = SHAPES["llama-1b"] | {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def test_transformers_loads_the_model_and_its_tokenizer_has_every_token(
    tiny_base: TinyBase, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_base("llama").prepared.path
    make_model(SMALL, source, tmp_path / "model", seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.shape == (600, 64)
    tokenizer, original = (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(source),
    )
    assert all(tokenizer.decode([token]) for token in range(len(original), 600))
    text = "tea <unused599> time"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("tea time")["input_ids"] == original("tea time")["input_ids"]
    with pytest.raises(BenchError, match="exists already"):
        make_model(SMALL, source, tmp_path / "model", seed=1)


def test_the_weights_depend_on_the_seed(tiny_base: TinyBase, tmp_path: Path) -> None:
    source = tiny_base("llama").prepared.path
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        make_model(SMALL, source, tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_vocabulary_is_filled_without_gaps() -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 3}}, "added_tokens": [{"id": 1, "content": "<s>"}]}
    filled = fill_vocabulary(tokenizer, 5)["model"]["vocab"]
    assert sorted(filled.values()) == [0, 2, 3, 4]
    with pytest.raises(BenchError, match="ids up to 3"):
        fill_vocabulary(tokenizer, 3)


def test_the_1b_shape_has_about_1b_weights() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["llama-1b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.236e9, rel=1e-3)


def test_shapes_are_json() -> None:
    assert json.loads(json.dumps(SHAPES)) == SHAPES
