"""Every field that a client may set reaches ``manylora train`` as a flag."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.config import from_args
from server.finetune.command.cli import add_parser
from server.finetune.command.options import chosen
from server.finetune.jobs import command
from server.finetune.jobs.command import train_command, train_environ
from server.http.fine_tuning_schema import CreateJob, Recipe
from tests.server.finetune.jobs.room import Room

# For each field: the value to send, the flag's field in the command, and its value there.
FIELDS: dict[str, tuple[Any, str, Any]] = {
    "adapter_method": ("dora", "method", "dora"),
    "r": (4, "r", 4),
    "alpha": (8.0, "alpha", 8.0),
    "dropout": (0.125, "dropout", 0.125),
    "target_modules": (["q_proj", "v_proj"], "target_modules", ("q_proj", "v_proj")),
    "learning_rate": (1e-5, "learning_rate", 1e-5),
    "max_seq_len": (64, "max_seq_len", 64),
    "max_steps": (5, "max_steps", 5),
    "packing": (True, "packing", True),
    "prune_rank": (0.25, "prune_rank", 0.25),
    "seed": ((1 << 31) - 1, "seed", (1 << 31) - 1),
    "n_epochs": (2, "epochs", 2.0),
    "batch_size": (3, "batch_size", 3),
    "learning_rate_multiplier": (0.5, "lr_multiplier", 0.5),
}


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", ())


def parsed(room: Room, **fields: Any) -> argparse.Namespace:
    body = CreateJob.model_validate(
        {"model": "base", "training_file": room.upload().id} | fields, strict=True
    )
    words = train_command(room.jobs.draft(body.job_request()), Path("/run"), room.files, room.config)
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["train", *words])


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_a_flag(room: Room, name: str) -> None:
    value, field, expected = FIELDS[name]
    hyper = name in command._HYPERPARAMETERS
    fields = {"hyperparameters": {name: value}} if hyper else {name: value}
    given = chosen(parsed(room, validation_file=room.upload().id, **fields))
    assert given[field] == expected
    assert given[field] != chosen(parsed(room))[field]


def test_no_field_is_forgotten() -> None:
    fields = Recipe.model_fields.keys() | command._HYPERPARAMETERS.keys()
    assert fields == FIELDS.keys() - {"seed"} | {"require_improvement"}


def test_a_job_uses_the_servers_options(room: Room) -> None:
    (room.home / "other").mkdir()
    job_room = Room(room.home / "other", "--train-threads", "3", "--train-yield", "0.25", "--base", "b")
    assert not parsed(room).allow_special_tokens
    assert not parsed(room).ignore_adapter_templates
    given = parsed(job_room, name="acme", require_improvement=True, validation_file=job_room.upload().id)
    assert (given.threads, given.duty, given.base, given.name) == (3, 0.75, "b", "acme")
    assert (given.output_dir, given.run_dir) == (job_room.config.adapters.folder, Path("/run"))
    assert given.require_improvement
    assert given.resume
    room.config = replace(room.config, model=replace(room.config.model, allow_special_tokens=True))
    room.config = replace(room.config, adapters=replace(room.config.adapters, ignore_templates=True))
    assert parsed(room).allow_special_tokens
    assert parsed(room).ignore_adapter_templates


def test_a_job_trains_the_config_that_is_served(room: Room) -> None:
    assert parsed(room).hf_overrides is None
    overrides = '{"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}'
    room.config = replace(room.config, model=replace(room.config.model, hf_overrides=overrides))
    assert parsed(room).hf_overrides == overrides


def test_the_child_gets_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "sesame")
    assert "sesame" not in train_environ(from_args([], {}).training).values()


@pytest.mark.parametrize(
    ("gpu", "visible", "device"),
    [
        ("auto", "0,1", "cuda"),
        ("1", "1", "cuda"),
        ("GPU-8f6a1f2c", "GPU-8f6a1f2c", "cuda"),
        ("none", "", "cpu"),
    ],
)
def test_a_job_sees_the_gpu_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, visible: str, device: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    room = Room(tmp_path, "--device", "cuda", "--train-gpu", gpu, "--train-gpu-memory", "12GiB")
    assert train_environ(room.config.training)["CUDA_VISIBLE_DEVICES"] == visible
    given = parsed(room)
    assert given.device == device
    assert chosen(given)["gpu_memory"] == 12 << 30
    room.database.close()
