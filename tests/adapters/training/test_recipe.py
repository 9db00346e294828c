"""Errors of wrong values name the flag. Configs for several GPUs reach transformers unchanged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import RecipeInvalid
from adapters.training import TrainConfig
from adapters.training.arguments import training_arguments
from adapters.training.recipe import learning_rate_for
from adapters.training.schedule import epochs_for, steps_for

DATA = Path("train.jsonl")


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"r": 0}, "--r"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": float("nan")}, "--epochs"),
        ({"learning_rate": 0.0}, "--lr"),
        ({"learning_rate": 2.0}, "--lr"),
        ({"duty": 0.0}, "--duty"),
        ({"method": "pissa"}, "--method"),
        ({"target_modules": ()}, "--target-modules"),
        ({"prune_rank": 0.1}, "--prune-rank needs --eval"),
        ({"prune_rank": -1.0, "eval_data": DATA}, "--prune-rank"),
        ({"deepspeed": DATA, "fsdp": "full_shard"}, "--deepspeed and --fsdp"),
        ({"fsdp_config": DATA}, "--fsdp-config needs --fsdp"),
    ],
)
def test_the_error_of_a_wrong_value_names_its_flag(fields: dict[str, Any], flag: str) -> None:
    with pytest.raises(RecipeInvalid, match=flag):
        TrainConfig(data=DATA, **fields)


def test_learning_rates_are_lower_for_larger_bases() -> None:
    assert [learning_rate_for(size * 10**9) for size in (0, 7, 33)] == [1e-3, 2e-4, 1e-4]


def test_the_number_of_steps_equals_the_trainers() -> None:
    config = TrainConfig(data=DATA, batch_size=4, accumulation=2, epochs=1.5)
    assert steps_for(17, config) == 5  # 5 batches, 3 steps an epoch


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 25), (30, 25), (60, 13), (100, 8), (287, 3), (2000, 3), (8333, 3), (12_000, 2), (10**6, 1)],
)
def test_epochs_follow_from_the_rows(rows: int, epochs: int) -> None:
    assert epochs_for(rows, TrainConfig(data=DATA)) == epochs
    assert epochs_for(rows, TrainConfig(data=DATA, epochs=0.5)) == 0.5


def test_adalora_needs_steps() -> None:
    config = TrainConfig(data=DATA, method="adalora", max_steps=9)
    with pytest.raises(RecipeInvalid, match="at least 10 optimiser steps"):
        steps_for(17, config)


def test_an_fsdp_config_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
    config = TrainConfig(data=DATA, fsdp="full_shard auto_wrap", fsdp_config=file)
    arguments = training_arguments(config, tmp_path, "cpu", 10, 1e-3)
    assert arguments.fsdp_plugin_args
    assert arguments.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]


def test_a_deepspeed_config_is_accepted_if_deepspeed_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "zero2.json"
    stage = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    file.write_text(json.dumps(stage | sizes))
    config = TrainConfig(data=DATA, deepspeed=file)
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(RecipeInvalid, match="pip install deepspeed"):
            training_arguments(config, tmp_path, "cpu", 10, 1e-3)
    else:
        assert training_arguments(config, tmp_path, "cpu", 10, 1e-3).hf_deepspeed_config.is_zero2()
