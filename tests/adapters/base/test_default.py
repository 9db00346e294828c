"""The real default base: SmolLM2-135M-Instruct in NF4."""

from __future__ import annotations

import pytest

from adapters.base import DEFAULT_BASE, LoadedBase, prepare_base


def test_it_answers(default_base: LoadedBase) -> None:
    tokenizer = default_base.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = default_base.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris")


def test_it_is_known_by_its_hub_id(default_base: LoadedBase) -> None:
    assert default_base.layout.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert default_base.prepared.name == "smollm2-135m"
    assert len(default_base.layout.sites) == 30 * 7


def test_numbers_are_split_into_digits(default_base: LoadedBase) -> None:
    tokenizer = default_base.tokenizer
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]
    assert tokenizer.decode(tokenizer("Ünïcode, 12!\n\n  ok")["input_ids"]) == "Ünïcode, 12!\n\n  ok"


def test_a_prepared_base_needs_no_network(default_base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("pip was called"))
    home = default_base.prepared.path.parents[1]
    assert prepare_base(DEFAULT_BASE, home, progress=False) == default_base.prepared
