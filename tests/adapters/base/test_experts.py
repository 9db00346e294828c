"""Experts in NF4: what is stored, and that they compute what transformers computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.base import LoadedBase, load_base, prepare_base
from adapters.base.experts import (
    MATRICES,
    Nf4Experts,
    can_be_nf4,
    computing_as_transformers,
    dense_experts,
    nf4_experts,
)
from adapters.base.weight_bytes import count_weight_bytes
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import make_tiny_model

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"]
TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sparse")


def _load(family: str, home: Path, **options: Any) -> LoadedBase:
    folder = home / family
    if not folder.exists():
        make_tiny_model(family, folder)
    return load_base(prepare_base(str(folder), home, progress=False, **options))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def _experts(base: LoadedBase) -> Nf4Experts:
    return next(iter(nf4_experts(base.model).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_on_the_same_weights(family: str, home: Path) -> None:
    model = _load(family, home).model
    assert nf4_experts(model)
    assert not dense_experts(model)
    ours = _logits(model)
    with computing_as_transformers(model):
        theirs = _logits(model)
    assert (ours - theirs).abs().max() < 0.02 * theirs.std()


def test_experts_equal_a_loop_in_float32(home: Path) -> None:
    experts = _experts(_load("qwen3_moe", home))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator).bfloat16()
    chosen = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(33)])
    weights = torch.rand(33, 4, generator=generator).bfloat16()
    expected = torch.zeros(33, 64)
    for token, expert, weight in zip(
        torch.arange(33).repeat_interleave(4), chosen.flatten(), weights.flatten(), strict=True
    ):
        gate_up, down = (experts.dense(name, int(expert)).float() for name in MATRICES)
        gate, up = (gate_up @ x[token].float()).chunk(2)
        expected[token] += weight.float() * (down @ (torch.nn.functional.silu(gate) * up))
    with torch.no_grad():
        ours = experts(x, chosen, weights).float()
    assert (ours - expected).abs().max() < 0.03 * expected.std()


def test_each_token_by_itself_is_the_same_to_the_bit(home: Path) -> None:
    experts = _experts(_load("qwen3_moe", home))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 64, generator=generator).bfloat16()
    chosen = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(9)])
    weights = torch.rand(9, 4, generator=generator).bfloat16()
    with torch.no_grad():
        together = experts(x, chosen, weights)
        alone = [experts(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1])[0] for i in range(9)]
    assert (together - torch.stack(alone)).abs().max() < 0.01 * together.std()
    assert experts(x[:0], chosen[:0], weights[:0]).shape == (0, 64)


def test_weights_are_quantised_as_bitsandbytes_does(home: Path) -> None:
    base = _load("mixtral", home)
    dense = load_file(home / "mixtral" / "model.safetensors")
    for layer, experts in enumerate(nf4_experts(base.model).values()):
        for expert in range(experts.num_experts):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate_up = torch.cat([dense[f"{prefix}.{name}.weight"] for name in ("w1", "w3")])
            for name, original in zip(MATRICES, (gate_up, dense[f"{prefix}.w2.weight"]), strict=True):
                ours = experts.dense(name, expert).float()
                packed, state = bnb.quantize_4bit(original.flatten(), blocksize=64, quant_type="nf4")
                theirs = bnb.dequantize_4bit(packed, state).view_as(ours).float()
                torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)  # our scales are bf16


def test_the_checkpoint_has_no_dense_experts_and_counts_as_it_is(home: Path) -> None:
    base = _load("mixtral", home)
    tensors = load_file(base.prepared.path / "model.safetensors")
    stored = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8, torch.bfloat16}
    experts = nf4_experts(base.model).values()
    weights = sum(one.num_weights for one in experts)
    assert sum(one.bytes for one in experts) == weights * 4.25 / 8
    assert sum(tensor.nbytes for tensor in stored.values()) == weights * 4.25 / 8
    found = count_weight_bytes(base.model)
    assert found.four_bit > weights * 4.25 / 8
    assert (found.dense_experts, found.dense_kinds) == (0, ())


def test_a_prepared_sparse_base_is_used_as_it_is(home: Path) -> None:
    base = _load("mixtral", home)
    again = prepare_base(str(base.prepared.path), home, progress=False)
    assert again.path == base.prepared.path
    assert torch.equal(_logits(load_base(again).model), _logits(base.model))


def test_the_head_may_be_4_bit_too(home: Path) -> None:
    base = _load("olmoe", home, head_quantization="nf4")
    assert nf4_experts(base.model)
    settings = json.loads((base.prepared.path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "manylora_nf4"


def test_gradients_flow_through_frozen_experts(home: Path) -> None:
    experts = _experts(_load("olmoe", home))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    chosen, weights = torch.tensor([[0, 1], [1, 2], [5, 0], [7, 1], [2, 3]]), torch.rand(5, 2).bfloat16()

    def gradients(forward: Any) -> tuple[Tensor, Tensor]:
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        forward(inputs[0], chosen, inputs[1]).float().square().sum().backward()
        return inputs[0].grad, inputs[1].grad  # type: ignore[return-value]

    for ours, theirs in zip(gradients(experts), gradients(experts.transformers_forward), strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.std()


@pytest.mark.parametrize("family", ["gpt_oss", "longcat_flash", "llama"])
def test_other_modules_stay_as_they_are(family: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    assert not any(map(can_be_nf4, model.modules()))


def test_rows_that_are_not_whole_blocks_stay_dense() -> None:
    from transformers import AutoModelForCausalLM

    for size, expected in [(64, True), (96, False)]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", moe_intermediate_size=size))
        assert any(map(can_be_nf4, model.modules())) == expected
