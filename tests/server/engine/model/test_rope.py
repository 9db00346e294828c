"""LongRoPE and dynamic NTK scaling use transformers' frequencies for the longest served sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.errors import BaseModelError
from server.engine.build import Parts
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import LONGROPE, PHI3, make_tiny_model

DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
SHORT, LONG = list(range(10, 30)), list(range(100, 200))


def _frequencies(folder: Path, position: int) -> Tensor:
    """transformers' frequencies for a sequence that ends at ``position``."""
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[position]]))
    frequencies: Tensor = rotary.inv_freq
    return frequencies


def _first_logits(parts: Parts, *prompts: list[int]) -> list[Tensor]:
    """The logits after each prompt, all in one batch."""
    recorder = LogitsRecorder(parts.model)
    parts.engine.model = recorder
    asked = [Asked(prompt, params={"max_tokens": 2, "ignore_eos": True}) for prompt in prompts]
    Driver(parts).run(*asked)
    return [recorder.of(one)[0] for one in asked]


def _own_logits(folder: Path, prompt: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    return logits


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.std()) < 0.1


@pytest.mark.parametrize(("flags", "position"), [([], 511), (["--max-model-len", "32"], 31)])
def test_longrope_has_the_factors_of_the_served_context(
    flags: list[str], position: int, tmp_path: Path
) -> None:
    folder = make_tiny_model("phi3", tmp_path / "model", **PHI3)
    parts = build(folder, tmp_path, "--quantization", "none", *flags)
    assert torch.equal(parts.base.model.model.rotary_emb.inv_freq, _frequencies(folder, position))
    parts.close()


def test_longrope_beyond_the_original_length_equals_transformers_in_any_batch(tmp_path: Path) -> None:
    folder = make_tiny_model("phi3", tmp_path / "model", **PHI3)
    flags = ["--quantization", "none", "--max-num-batched-tokens", "64", "--no-enable-prefix-caching"]
    parts = build(folder, tmp_path, *flags)
    short, long = _first_logits(parts, SHORT, LONG)
    assert _close(long, _own_logits(folder, LONG))
    assert _close(short, _first_logits(parts, SHORT)[0])
    parts.close()


def test_longrope_within_the_original_length_equals_transformers(tmp_path: Path) -> None:
    folder = make_tiny_model("phi3", tmp_path / "model", **PHI3)
    parts = build(folder, tmp_path, "--quantization", "none", "--max-model-len", "32")
    assert _close(_first_logits(parts, SHORT)[0], _own_logits(folder, SHORT))
    parts.close()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(("flags", "length"), [([], 256), (["--max-model-len", "100"], 100)])
def test_dynamic_scaling_is_that_of_the_served_context(
    quantization: str, flags: list[str], length: int, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", **DYNAMIC)
    parts = build(folder, tmp_path, "--quantization", quantization, *flags)
    assert parts.info.max_model_len == length
    wanted = _frequencies(folder, length - 1)
    assert torch.equal(parts.base.model.model.rotary_emb.inv_freq, wanted)
    assert not torch.equal(wanted, _frequencies(folder, 0))
    _first_logits(parts, list(range(3, length - 4)))
    parts.close()


def test_yarn_serves_the_scaled_length(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    folder = make_tiny_model("qwen2", tmp_path / "model", max_position_embeddings=64, rope_parameters=rope)
    parts = build(folder, tmp_path, "--max-num-batched-tokens", "64")
    assert parts.info.max_model_len == 256
    (logits,) = _first_logits(parts, LONG * 2)
    assert logits.isfinite().all()
    parts.close()


def test_a_scale_that_depends_on_the_step_is_refused_with_a_length_that_works(tmp_path: Path) -> None:
    rope = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5}
    folder = make_tiny_model("phimoe", tmp_path / "model", num_local_experts=4, rope_parameters=rope)
    with pytest.raises(BaseModelError, match=r"\(phimoe\) cannot be served: .*step.*--max-model-len 32"):
        build(folder, tmp_path, "--quantization", "none")
    build(folder, tmp_path, "--quantization", "none", "--max-model-len", "32").close()
