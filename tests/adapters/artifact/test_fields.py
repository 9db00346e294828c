"""Every field of PEFT's LoraConfig is in one table: it is read, it is a label, or it must be neutral."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest

from adapters.artifact import inspect_adapter
from adapters.artifact.config import LoraSettings
from adapters.artifact.fields import DECIDES, KNOWN_PEFT, LABELS, REFUSED
from adapters.base_names import same_base
from tests.adapters.artifact.folders import LAYOUT, LIMITS, config, write_folder

FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_pefts_is_in_one_place(name: str) -> None:
    assert sum(name in place for place in (DECIDES, LABELS, REFUSED)) == 1


def test_no_newer_peft_is_installed_than_the_table_knows() -> None:
    assert tuple(int(part) for part in version("peft").split(".")[:2]) <= KNOWN_PEFT


def test_fields_that_decide_are_read() -> None:
    read = {field.name for field in dataclasses.fields(LoraSettings)} - {"base_model", "warnings"}
    assert DECIDES - read == {"peft_type", "init_lora_weights"}
    assert read <= DECIDES


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("neutral", [None, False, [], {}])
def test_refused_fields_may_be_neutral(name: str, neutral: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", config(**{name: neutral}))
    assert inspect_adapter(folder, LAYOUT, LIMITS).warnings == ()


def test_pefts_own_defaults_are_neutral(tmp_path: Path) -> None:
    defaults = {k: v for k, v in peft.LoraConfig(r=4, lora_alpha=8).to_dict().items() if v is not None}
    defaults |= {"target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    assert inspect_adapter(write_folder(tmp_path / "a", defaults), LAYOUT, LIMITS).warnings == ()


def test_listed_texts_are_shortened(tmp_path: Path) -> None:
    long = {"base_model_name_or_path": "x" * 10_000, "modules_to_save": ["y" * 10_000] * 9, "z" * 10_000: 1}
    info = inspect_adapter(write_folder(tmp_path / "a", config(**long)), LAYOUT, LIMITS)
    assert info.base_model == "x" * 500
    assert len(info.warnings) == 3
    assert max(map(len, info.warnings)) < 1000


LABELLED: list[tuple[dict[str, Any], str | None]] = [
    ({"lora_dropout": 0.1, "peft_version": "0.99", "inference_mode": True, "revision": "main"}, None),
    ({"auto_mapping": {"unsloth_fixed": True}, "megatron_core": "megatron.core"}, None),
    ({"qalora_group_size": 16, "eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, None),
    ({"fan_in_fan_out": True, "merge_weights": False, "enable_lora": None}, None),
    ({"use_future": False, "future_config": None, "future_list": [], "peft_version": "0.99"}, None),
    ({"task_type": None}, None),
    ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; it is served as an adapter of a causal"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; it is served as"),
    ({"task_type": ["?"]}, "task_type is ['?']; it is served as"),
    (
        {"modules_to_save": ["classifier", "score"]},
        "modules_to_save names classifier, score, which the base does",
    ),
    (
        {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"scale": 20.0}},
        "has fields that PEFT's LoRA does not have, and they are ignored: fine_tune_type, lora_parameters",
    ),
    ({f"x{i}": 1 for i in range(9)}, "are ignored: x0, x1, x2, x3, x4, …."),
    ({"hyper_lora": {"depth": 2}, "peft_version": "0.20.1"}, "are ignored: hyper_lora."),
    ({"hyper_lora": {"depth": 2}, "peft_version": {"git": "main"}}, "are ignored: hyper_lora."),
]


@pytest.mark.parametrize(("labels", "warning"), LABELLED, ids=lambda value: str(value)[:40])
def test_labels_only_warn(labels: dict[str, Any], warning: str | None, tmp_path: Path) -> None:
    info = inspect_adapter(write_folder(tmp_path / "a", config(**labels)), LAYOUT, LIMITS)
    assert info.rank == 4
    assert len(info.warnings) == (warning is not None)
    assert warning is None or warning in info.warnings[0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct", True),
        ("/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd60/", "qwen3-8b", True),
        ("/hub/models--gpt2/snapshots/607a30d783dfa663", "openai-community/gpt2", True),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen/Qwen3-8B", True),
        ("/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd60", "Qwen/Qwen3-4B", False),
        ("b968826d9c46dd60", "Qwen/Qwen3-8B", False),
    ],
)
def test_names_of_a_base_are_equal_if_they_mean_the_same_model(one: str, other: str, same: bool) -> None:
    assert same_base(one, other) == same_base(other, one) == same
