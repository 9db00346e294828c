"""Checks before weights are loaded: of recipes, of rows, and of the limits of a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.artifact import Limits
from adapters.base import load_base, prepare_base
from adapters.base.outline import BaseOutline, outline_of
from adapters.errors import DatasetInvalid, RecipeInvalid
from adapters.training import RunFolder, TrainConfig, check, fit, train
from adapters.training.check import check_run
from adapters.training.encode import encode_dataset
from adapters.training.servable import Serving
from tests.support.tiny_models import FAMILIES, make_tiny_model
from tests.support.training_tasks import QUESTIONS, row, run_in

SERVING = Serving(Limits(max_rank=64, max_bytes=1 << 29), extra_bytes=1 << 29)


@pytest.fixture(scope="module")
def outline(task: dict[str, Any]) -> BaseOutline:
    return outline_of(prepare_base(task["base"], task["home"], progress=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outline_equals_that_of_the_loaded_base(tmp_path: Path, family: str) -> None:
    prepared = prepare_base(str(make_tiny_model(family, tmp_path / "base")), tmp_path, progress=False)
    outline, loaded = outline_of(prepared), load_base(prepared)
    assert outline.layout == loaded.layout
    assert outline.context == loaded.model.config.get_text_config().max_position_embeddings
    configured = loaded.model.generation_config.eos_token_id
    assert outline.eos == frozenset(configured if isinstance(configured, list) else [configured])


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def long_row(words: int) -> dict[str, Any]:
    question = {"role": "user", "content": "ab " * words}
    return {"messages": [question, {"role": "assistant", "content": "yes"}]}


REFUSALS: list[tuple[dict[str, Any], Serving, str]] = [
    ({"r": 65}, SERVING, r"--r 65 is too large .*up to 64 \(--max-lora-rank\)"),
    ({"r": 48, "method": "adalora"}, SERVING, "may leave rank 72"),
    ({"r": 65, "prune_rank": 0.1}, SERVING, "--r 65 is too large"),
    ({"target_modules": ("qproj",)}, SERVING, "'qproj' matches no module .*down_proj, .*q_proj"),
    ({"target_modules": ("q_proj", "typo")}, SERVING, "'typo' matches no module"),
    ({"target_modules": ("self_attn",)}, SERVING, "which is not a linear"),
    ({"target_modules": ("embed_tokens",)}, SERVING, "which is not a linear"),
    ({"target_modules": ("norm",)}, SERVING, "which is not a linear"),
    ({"r": 32}, Serving(Limits(64, 10_000), 1 << 20), "cannot be served: The adapter takes"),
    ({"method": "dora"}, Serving(Limits(64, 1 << 29), 100), r"--lora-extra-memory"),
    ({"method": "adalora", "epochs": 1.0}, SERVING, "at least 10 optimiser steps"),
]


@pytest.mark.parametrize(("fields", "serving", "reason"), REFUSALS)
def test_a_recipe_that_would_fail_later_is_refused(
    task: dict[str, Any], tmp_path: Path, fields: dict[str, Any], serving: Serving, reason: str
) -> None:
    with pytest.raises(RecipeInvalid, match=reason):
        check_run(TrainConfig(**{**task, **fields}), serving)
    if "method" not in fields and serving is SERVING and "target_modules" in fields:
        with pytest.raises(RecipeInvalid, match=reason):
            run_in(tmp_path, task, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 64},
        {"method": "rslora"},
        {"method": "dora"},
        {"method": "adalora"},
        {"target_modules": ("q_proj", "model.layers.0.mlp.down_proj")},
        {"target_modules": ("lm_head", "q_proj")},
    ],
)
def test_what_can_be_trained_and_served_passes(task: dict[str, Any], fields: dict[str, Any]) -> None:
    warnings = check_run(TrainConfig(**{**task, **fields}), SERVING)
    assert all("word for word" in warning or "also training rows" in warning for warning in warnings)


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_a_row_that_does_not_fit_is_named(task: dict[str, Any], tmp_path: Path, which: str) -> None:
    path = write(tmp_path, row(1), long_row(400), row(2))
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl has 1 row .*line 2 has \d+ tokens before"):
        check_run(TrainConfig(**{**task, which: path, "max_seq_len": 128}))


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_last_question_that_fills_the_context_is_named(
    task: dict[str, Any], tmp_path: Path, outline: BaseOutline, is_asked: bool
) -> None:
    turns = row(1)["messages"] + long_row(outline.context)["messages"]
    path = write(tmp_path, row(0), {"messages": turns}, name="held.jsonl")
    config = TrainConfig(**{**task, "eval_data": path})
    serving = replace(SERVING, is_asked=lambda _: is_asked)
    if not is_asked:
        assert "held.jsonl: examples longer than 512 tokens are truncated (1 of them)." in check_run(
            config, serving
        )
        return
    with pytest.raises(DatasetInvalid, match=r"held\.jsonl .* line 2 has a question of \d+ tokens"):
        check_run(config, serving)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(DatasetInvalid, match="line 2 has a question of"):
        train(config, run, serving=serving)
    run.close()


def test_rows_that_are_cut_are_counted(task: dict[str, Any], tmp_path: Path) -> None:
    long = {"messages": [*row(1)["messages"][:1], {"role": "assistant", "content": "ab " * 400}]}
    path = write(tmp_path, row(1), long, long, row(2))
    warnings = check_run(TrainConfig(**{**task, "data": path, "max_seq_len": 128, "eval_data": None}))
    assert "rows.jsonl: examples longer than 128 tokens are truncated (2 of them)." in warnings


def test_only_rows_that_may_be_too_long_are_tokenised(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = encode_dataset

    def counting(data: Any, *arguments: Any) -> Any:
        asked.append(len(data.rows))
        return whole(data, *arguments)

    monkeypatch.setattr(check, "encode_dataset", counting)
    monkeypatch.setattr(fit, "_BYTES_OF_TEMPLATE", 200)
    path = write(tmp_path, *map(row, range(QUESTIONS)), long_row(60))
    check_run(TrainConfig(**{**task, "data": path, "eval_data": None, "max_seq_len": 512}))
    assert asked == [2]  # a usual row, and the long one


def test_repeated_and_shared_rows_are_counted(task: dict[str, Any], tmp_path: Path) -> None:
    data = write(tmp_path, *[row(number) for number in (0, 1, 2, 3, 3, 3)])
    held_out = write(tmp_path, row(3), row(5), name="held.jsonl")
    warnings = check_run(TrainConfig(**{**task, "data": data, "eval_data": held_out}))
    assert [warning.partition(";")[0].partition(",")[0] for warning in warnings] == [
        "rows.jsonl: 2 of 6 rows repeat an earlier row word for word",
        "held.jsonl: 1 of 2 rows are also training rows",
    ]
