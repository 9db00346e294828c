"""The fused step refuses what it does not support. transformers' blocks then serve it, and it equals PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import load_base, prepare_base
from adapters.kernels.cpu import isa
from adapters.pool.rank_pool import RankPool
from server.engine.build import Parts
from server.engine.model import build_model
from server.engine.model.cpu.model import CpuModel
from server.engine.sequence import Chunk
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import PHI3, make_peft_adapter, make_tiny_model

pytestmark = pytest.mark.skipif(isa() != "avx512bf16", reason="the fused step does not run on this machine")
TOLERANCE = 0.1
"""The largest difference of a logit, in standard deviations. Another order of sums rounds differently."""

PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "head dimension": (
        "llama",
        {"head_dim": 24, "num_attention_heads": 8, "num_key_value_heads": 4},
        "multiples of 16",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "no fused GELUActivation"),
    "rope": ("llama", {"rope_parameters": PROPORTIONAL}, "does not know rope type"),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}, "no fused step for gpt2"),
    "partial rotary": (
        "phi",
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
        "for phi",
    ),
    "parallel blocks": ("cohere", {}, "for cohere"),
}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "scaled rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "window from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "LongRoPE beyond the original length": ("phi3", {**PHI3, "num_hidden_layers": 1}),
    "all of a head rotated in Phi-3": ("phi3", {"rope_parameters": {"rope_type": "default"}}),
    "one type of layer in Gemma 3": ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
}


def _serve(family: str, fields: dict[str, Any], home: Path) -> Parts:
    folder = make_tiny_model(family, home / "model", **fields)
    make_peft_adapter(folder, home / "adapters" / "mine", r=4)
    return build(folder, home)


def _distance_from_peft(parts: Parts, home: Path) -> float:
    """The largest difference of a logit over an answer, computed beside another request."""
    parts.engine.model = recorder = LogitsRecorder(parts.model)
    driver = Driver(parts)
    driver.resident("mine")
    asked = Asked([(7 * i) % 500 + 5 for i in range(41)], "mine", {"ignore_eos": True})
    driver.run(asked, Asked([9, 8, 7]))
    base = load_base(prepare_base(str(home / "model"), home, progress=False))
    model = PeftModel.from_pretrained(base.model, home / "adapters" / "mine").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([asked.prompt + asked.tokens[:-1]]), use_cache=False).logits[0].float()
    theirs = logits[len(asked.prompt) - 1 :]
    return float((recorder.of(asked) - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_served_by_transformers(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, fields, reason = REFUSED[case]
    with caplog.at_level("INFO", "manylora.engine"):
        parts = _serve(family, fields, tmp_path)
    assert parts.model.name == "transformers"
    assert reason in caplog.text
    assert _distance_from_peft(parts, tmp_path) < TOLERANCE


@pytest.mark.parametrize("case", KNOWN)
def test_supported_models_are_fused_and_equal_peft(case: str, tmp_path: Path) -> None:
    parts = _serve(*KNOWN[case], tmp_path)
    assert parts.model.name == "fused"
    assert _distance_from_peft(parts, tmp_path) < TOLERANCE


def test_a_model_with_other_results_is_not_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new version of transformers might change a norm like this."""
    base = load_base(
        prepare_base(str(make_tiny_model("llama", tmp_path / "model")), tmp_path, progress=False)
    )
    norm = type(base.model.model.norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) + 0.5 * x)
    with caplog.at_level("INFO", "manylora.engine"):
        model = build_model(base, RankPool(base.layout.sites, 4, torch.bfloat16), 16, 512, 1)
    assert model.name == "transformers"
    assert "the fused step differs" in caplog.text


@pytest.mark.parametrize(("max_tokens", "positions"), [(1, 512), (7, 512), (512, 24)])
def test_the_comparison_works_with_small_steps_and_short_contexts(
    max_tokens: int, positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", max_position_embeddings=positions)
    base = load_base(prepare_base(str(folder), tmp_path, progress=False))
    compared: list[int] = []
    run = CpuModel.__call__

    def watched(self: CpuModel, chunks: list[Chunk]) -> Tensor:
        compared.append(sum(chunk.length for chunk in chunks))
        return run(self, chunks)

    monkeypatch.setattr(CpuModel, "__call__", watched)
    model = build_model(base, RankPool(base.layout.sites, 4, torch.bfloat16), 16, max_tokens, 1)
    assert model.name == "fused"
    assert compared == [min(max_tokens, positions, 40)]


SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"num_key_value_heads": 1}),  # outputs in no whole panels of 32
        ("llama", {"intermediate_size": 96}),  # inputs in no whole blocks of 64
        ("qwen2_moe", SHARED_EXPERT),  # both; a gate of one output
    ],
)
def test_linears_that_bitsandbytes_cannot_pack_for_this_cpu_are_served_in_bf16(
    family: str, fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        parts = _serve(family, fields, tmp_path)
    assert "are kept in bf16" in caplog.text
    assert _distance_from_peft(parts, tmp_path) < TOLERANCE
