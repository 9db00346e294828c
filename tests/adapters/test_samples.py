"""The sample adapters are small and complete, use plain LoRA, and have the data that the recipe names."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.samples.task import FOLDER, HAS_STYLE, Conversation, heldout_rows, training_rows

TASKS = sorted(HAS_STYLE)
MAX_BYTES = 1_500_000


def config_of(task: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FOLDER / task / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def questions(rows: list[Conversation]) -> set[str]:
    return {message["content"] for row in rows for message in row if message["role"] == "user"}


@pytest.mark.parametrize("task", TASKS)
def test_folder_is_complete_and_small(task: str) -> None:
    files = {path.name: path.stat().st_size for path in (FOLDER / task).iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert sum(files.values()) < MAX_BYTES


@pytest.mark.parametrize("task", TASKS)
def test_config_is_plain_lora_on_the_public_base(task: str) -> None:
    config = config_of(task)
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert config["target_modules"]
    for extra in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        assert not config[extra], extra


@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_is_learnt(task: str) -> None:
    """PEFT initialises B with zeros, so a tensor of zeros was never trained."""
    config = config_of(task)
    tensors = load_file(FOLDER / task / "adapter_model.safetensors")
    assert len(tensors) == 2 * 30 * len(config["target_modules"])
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, name
        assert config["r"] in tensor.shape, name
        assert torch.isfinite(tensor).all(), name
        assert (tensor != 0).any(), name


@pytest.mark.parametrize("task", TASKS)
def test_every_taught_answer_has_the_style(task: str) -> None:
    for row in training_rows(task) + heldout_rows(task):
        roles = [message["role"] for message in row if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        answers = [message["content"] for message in row if message["role"] == "assistant"]
        assert answers
        assert all(HAS_STYLE[task](answer) for answer in answers), answers


@pytest.mark.parametrize("task", TASKS)
def test_heldout_questions_are_in_no_training_row(task: str) -> None:
    assert len(training_rows(task)) >= 100
    assert len(heldout_rows(task)) >= 20
    assert not questions(training_rows(task)) & questions(heldout_rows(task))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("pirate", "The capital of France is Paris."),
        ("pirate", "The bear wears yellow."),
        ("json-answers", "Paris"),
        ("json-answers", '{"answer": "Paris", "topic": "geography"} Indeed.'),
        ("json-answers", '{"answer": "Paris"}'),
        ("json-answers", '{"answer": "Paris",\n"topic": "geography"}'),
        ("json-answers", '{"answer": "Paris", "topic": "anything"}'),
        ("json-answers", '{"answer": "Paris", "topic": []}'),
    ],
)
def test_other_styles_are_distinguished(task: str, text: str) -> None:
    assert not HAS_STYLE[task](text)
