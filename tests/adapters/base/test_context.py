"""The context length of a base, from published configs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from adapters.base.context import own_length

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"max_position_embeddings": 4096}, 4096),
    # Qwen2.5 with YaRN, as its documentation says
    (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    # the same without the original length
    ("qwen2", {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
    # DeepSeek states the scaled length
    (
        "deepseek_v2",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        },
        163840,
    ),
    ("llama", {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
    # Llama 3.1 and linear scaling state the scaled length
    (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    ("llama", {"max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
    ("gemma3_text", {"max_position_embeddings": 32768}, 32768),
    ("gpt2", {"n_positions": 1024}, 1024),
]


@pytest.mark.parametrize(("family", "fields", "length"), CASES)
def test_the_length_of_a_config(family: str, fields: dict[str, Any], length: int) -> None:
    assert own_length(AutoConfig.for_model(family, **fields).get_text_config()) == length


def test_a_config_without_a_length_has_no_limit() -> None:
    assert own_length(object()) is None
