"""A mixed batch equals each request alone, and both equal PEFT on the same 4-bit base."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapters.kernels.cpu
import server.engine.model.cpu.model
from tests.support.exactness import (
    ADAPTERS,
    TOLERANCE,
    check_close,
    compare_with_peft,
    make_adapters,
    prompts,
    run_mixed,
)
from tests.support.running_engine import Asked, build
from tests.support.tiny_models import FAMILIES, Family, make_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(family: Family, tmp_path: Path) -> None:
    parts = compare_with_peft(family, tmp_path)
    assert (parts.model.name == "fused") == (adapters.kernels.cpu.isa() == "avx512bf16")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_native_kernels_it_equals_peft_too(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (adapters.kernels.cpu, server.engine.model.cpu.model):
        monkeypatch.setattr(module, "library", lambda: None)
    parts = compare_with_peft(family, tmp_path)
    assert parts.model.name == "transformers"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("native", [True, False])
def test_it_equals_peft_with_the_head_in_4_bits_too(
    family: Family, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        for module in (adapters.kernels.cpu, server.engine.model.cpu.model):
            monkeypatch.setattr(module, "library", lambda: None)
    monkeypatch.setitem(ADAPTERS, "attention", {"r": 4, "target_modules": ["q_proj", "lm_head"]})
    parts = compare_with_peft(family, tmp_path, head="nf4")
    assert (parts.model.name == "fused") == (native and adapters.kernels.cpu.isa() == "avx512bf16")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_a_mixed_batch_equals_each_request_alone(family: Family, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path / family)
    make_adapters(family, folder, tmp_path / "adapters")
    parts = build(folder, tmp_path, "--max-num-batched-tokens", "64", "--no-enable-prefix-caching")
    together = prompts(parts.tokenizer.vocab_size)
    mixed = run_mixed(parts, together)
    for asked in together:
        alone = Asked(asked.prompt, asked.adapter, asked.params)
        single = run_mixed(parts, [alone])
        assert max(len(batch) for batch in single.batches) == 1
        check_close(mixed.of(asked)[:1], single.of(alone)[:1], asked.tokens[:1], TOLERANCE)
        if alone.tokens == asked.tokens:
            check_close(mixed.of(asked), single.of(alone), asked.tokens, TOLERANCE)


def test_adapters_do_change_the_answer(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "llama")
    make_adapters("llama", folder, tmp_path / "adapters")
    parts = build(folder, tmp_path)
    prompt = list(range(10, 30))
    answers = [Asked(prompt, name) for name in (*ADAPTERS, None)]
    recorder = run_mixed(parts, answers)
    first = [recorder.of(asked)[0] for asked in answers]
    scale = first[-1].std()
    for i, one in enumerate(first):
        for other in first[i + 1 :]:
            assert (one - other).abs().max() / scale > 3 * TOLERANCE
