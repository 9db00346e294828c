"""Every kind of PEFT's LoRA in one mixed batch with plain adapters and the base, compared with PEFT.

PEFT runs on the base's dequantised weights. Its DoRA misreads 4-bit weights that bitsandbytes packed for the
CPU, and computes wrong norms.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import adapters.kernels.cpu
import server.engine.model.cpu.model
from adapters.base import LoadedBase, Quantization, load_base, prepare_base
from server.engine.build import Parts
from server.engine.model.cuda.model import CudaModel
from server.engine.model.transformers_model import TransformersModel
from server.engine.sequence import Chunk
from tests.server.engine.fake_gpu import pretend
from tests.support.exactness import TOLERANCE, check_close
from tests.support.native_kernels import threads
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import make_peft_adapter, make_tiny_model

ATTENTION = ["q_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "dora": {"r": 5, "use_dora": True, "use_rslora": True},
    "dora-attention": {"r": 4, "use_dora": True, "target_modules": ATTENTION},
    "bias-all": {"r": 4, "target_modules": ["o_proj"], "bias": "all"},
    "bias-lora-only": {"r": 4, "target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "dora-bias": {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "all", "use_dora": True},
    "lora-bias": {"r": 4, "target_modules": ATTENTION, "lora_bias": True},
    "embedding": {"r": 7, "target_modules": ["q_proj", "embed_tokens"]},
    "embedding-dora": {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"r": 6, "target_modules": ["v_proj", "lm_head"]},
    "head-dora": {"r": 4, "target_modules": ["lm_head"], "use_dora": True},
    "norms": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved-embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-head": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "save_embedding_layers": True,
        "task_type": "SEQ_2_SEQ_LM",
    },
    "all-of-it": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["layernorm", "lm_head"],
    },
    "tied": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tied-lora": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved-by-the-way": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "replaced_embedding": True},
}
TYING = frozenset({"tied", "tied-lora"})
AT_SITES = ["plain", "dora", "dora-attention", "bias-all", "bias-lora-only", "dora-bias", "lora-bias"]
"""Kinds that replace no module of the base."""


@dataclass(frozen=True)
class Case:
    """A base. ``without``: the kinds that PEFT does not support on it."""

    family: str
    fields: dict[str, Any] = field(default_factory=dict)
    head: Quantization = "none"
    without: frozenset[str] = frozenset()

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind not in self.without]


BASES = {
    "qwen2": Case("qwen2", without=TYING),
    "llama": Case("llama", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"tie_word_embeddings": True}),
    "gemma2": Case("gemma2", {"final_logit_softcapping": 3.0}),
    "head in 4 bits": Case("gemma2", {"final_logit_softcapping": 3.0}, "nf4", TYING | {"saved-by-the-way"}),
}


def _serve(case: Case, home: Path, *flags: str) -> Parts:
    base = make_tiny_model(case.family, home / "base", **case.fields)
    for seed, kind in enumerate(case.kinds):
        make_peft_adapter(base, home / "adapters" / kind, seed=seed, **KINDS[kind])
    parts = build(base, home, "--max-loras", "32", "--head-quantization", case.head, *flags)
    assert not [entry for entry in parts.registry.entries() if entry.state == "failed"]
    return parts


def _requests(parts: Parts, kinds: list[str]) -> list[Asked]:
    generator = torch.Generator().manual_seed(0)
    names: list[str | None] = [*kinds, None]
    return [
        Asked(
            torch.randint(3, parts.tokenizer.vocab_size, (3 + 5 * (i % 5),), generator=generator).tolist(),
            name,
            {"ignore_eos": True, "max_tokens": 4},
        )
        for i, name in enumerate(names)
    ]


def _run(parts: Parts, *requests: Asked) -> LogitsRecorder:
    recorder = LogitsRecorder(parts.model)
    parts.engine.model = recorder
    driver = Driver(parts)
    driver.resident(*{asked.adapter for asked in requests if asked.adapter})
    driver.run(*requests)
    parts.engine.check_idle()
    parts.residency.check_integrity()
    return recorder


def _peft_logits(base: LoadedBase, folder: Path, asked: Asked) -> Tensor:
    """The logits [generated, vocabulary] of one pass over prompt and answer."""
    model = copy.deepcopy(base.model)
    if asked.adapter is not None:
        model = PeftModel.from_pretrained(model, folder / asked.adapter).eval()
    tokens = torch.tensor([asked.prompt + asked.tokens[:-1]])
    with torch.inference_mode():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits[0, len(asked.prompt) - 1 :].float()


def _compare_with_peft(case: Case, tmp_path: Path, kinds: list[str] | None = None) -> Parts:
    parts = _serve(case, tmp_path, "--max-num-batched-tokens", "64")
    requests = _requests(parts, kinds or case.kinds)
    recorder = _run(parts, *requests)
    assert max(len(batch) for batch in recorder.batches) == len(requests), "one step must have all kinds"
    prepared = prepare_base(str(tmp_path / "base"), tmp_path, head_quantization=case.head, progress=False)
    base = load_base(prepared)
    base.model.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for asked in requests:
            theirs = _peft_logits(base, tmp_path / "adapters", asked)
            check_close(recorder.of(asked), theirs, asked.tokens, TOLERANCE)
    return parts


@pytest.mark.parametrize("base", BASES)
def test_every_kind_in_one_batch_equals_peft(base: str, tmp_path: Path) -> None:
    _compare_with_peft(BASES[base], tmp_path)


@pytest.mark.parametrize("base", ["qwen2", "llama", "head in 4 bits"])
def test_without_the_native_kernels_it_equals_peft_too(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (adapters.kernels.cpu, server.engine.model.cpu.model):
        monkeypatch.setattr(module, "library", lambda: None)
    assert _compare_with_peft(BASES[base], tmp_path).model.name == "transformers"


@pytest.mark.parametrize("base", ["qwen2", "gemma2", "head in 4 bits"])
@pytest.mark.parametrize("kinds", [AT_SITES, None], ids=["at sites", "all"])
def test_the_gpus_fused_step_serves_adapters_at_sites_and_transformers_blocks_the_others(
    base: str, kinds: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    steps: list[int] = []
    run = TransformersModel.__call__

    def counted(self: TransformersModel, chunks: list[Chunk], *others: Any) -> Tensor:
        steps.append(len(chunks))
        return run(self, chunks, *others)

    monkeypatch.setattr(TransformersModel, "__call__", counted)
    assert isinstance(_compare_with_peft(BASES[base], tmp_path, kinds).model, CudaModel)
    guard = 1
    assert (len(steps) > guard) == (kinds is None)


@pytest.mark.parametrize("base", ["qwen2", "gemma2", "head in 4 bits"])
def test_an_answer_has_the_same_bits_alone_and_among_all_kinds(base: str, tmp_path: Path) -> None:
    case = BASES[base]
    parts = _serve(case, tmp_path, "--no-enable-prefix-caching")
    if parts.model.name != "fused":
        pytest.skip("only the fused step guarantees this")
    with threads(2):
        together = _requests(parts, case.kinds)
        mixed = _run(parts, *together)
    for asked in together:
        alone = Asked(asked.prompt, asked.adapter, asked.params)
        single = _run(parts, alone)
        assert alone.tokens == asked.tokens
        assert torch.equal(single.of(alone), mixed.of(asked)), asked.adapter
