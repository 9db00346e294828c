from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adapters.base import load_base, prepare_base
from adapters.base.load import layout_of
from adapters.base.weights import BaseWeights
from adapters.errors import BaseModelError
from tests.support.tiny_models import make_tiny_model
from tests.support.tiny_zoo import save_tiny_model


def test_four_bit_weights_are_the_same_before_and_after_the_cpu_packs_them(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "qwen2")
    base = load_base(prepare_base(str(folder), tmp_path, progress=False))
    expected = copy.deepcopy(base.model).dequantize()
    weights = BaseWeights(base.model, base.layout)
    for step in range(2):
        for name in base.layout.sites:
            dense, theirs = weights.dense(name), expected.get_submodule(name).weight
            # Packing rounds the scale of each block to bf16.
            torch.testing.assert_close(dense, theirs, rtol=2**-7 if step else 0, atol=0)
        with torch.inference_mode():
            base.model(torch.tensor([[1, 2, 3]]))


def test_four_bit_weights_are_right_where_a_block_spans_two_rows(tmp_path: Path) -> None:
    """Rows have 96 values, so every other block of 64 spans two rows. bitsandbytes mixes up the scales."""
    folder = make_tiny_model("llama", tmp_path / "llama", intermediate_size=96)
    source = AutoModelForCausalLM.from_pretrained(folder)
    base = load_base(prepare_base(str(folder), tmp_path, progress=False))
    weights = BaseWeights(base.model, base.layout)
    assert any(site.in_features == 96 for site in base.layout.sites.values())
    for name in base.layout.sites:
        exact = source.get_submodule(name).weight
        assert (weights.dense(name) - exact).norm() < 0.12 * exact.norm(), name


def test_linears_that_transformers_did_not_load_in_4_bits_are_refused_by_name(tmp_path: Path) -> None:
    """transformers saves the projections of hrm_text as one, and cannot split it in 4 bits."""
    folder = save_tiny_model("hrm_text", tmp_path / "model")
    prepared = prepare_base(str(folder), tmp_path, progress=False)
    with pytest.raises(BaseModelError, match=r"model \(hrm_text\) .* no 4-bit weights \(first: .*q_proj\)"):
        load_base(prepared)


def test_a_bias_is_the_bases_own_or_none(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "qwen2")
    base = load_base(prepare_base(str(folder), tmp_path, progress=False))
    weights = BaseWeights(base.model, base.layout)
    has_bias = {name for name in base.layout.sites if weights.bias(name) is not None}
    assert has_bias == base.layout.biases
    assert all(name.endswith(("q_proj", "k_proj", "v_proj")) for name in has_bias)


def test_every_weight_can_be_read_as_output_rows() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    layout = layout_of(model, "gpt2")
    weights = BaseWeights(model, layout)
    for name, site in {**layout.sites, **layout.embedding_and_head}.items():
        assert weights.dense(name).shape == (site.out_features, site.in_features)
    assert layout.tied
    assert layout.norms["transformer.ln_f"] == {"weight": 8, "bias": 8}
    assert "transformer.h.0.attn.c_attn" in layout.biases
