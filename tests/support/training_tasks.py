"""A tiny base and a few rows that it can memorise in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.training import RunFolder, TrainConfig
from adapters.training import run as run_module
from adapters.training.run import Trained, train
from adapters.training.stop import Stop
from adapters.training.trainer import QloraTrainer
from tests.support.tiny_models import make_tiny_model

QUESTIONS = 12


def make_task(folder: Path, family: str = "llama") -> dict[str, Any]:
    """The fields of a ``TrainConfig`` that learns in 12 steps. The base is in ``folder``."""
    rows = [row(number) for number in range(QUESTIONS)]
    data, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    held_out.write_text("".join(json.dumps(one) + "\n" for one in rows[:4]))
    base = make_tiny_model(family, folder / "base")
    return {
        "data": data,
        "eval_data": held_out,
        "base": str(base),
        "home": folder / "home",
        "r": 4,
        "batch_size": 4,
        "epochs": 4.0,
        "learning_rate": 1e-2,
        "threads": 1,
    }


def row(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": "say " + "ab" * (1 + number % 5)}
    return {"messages": [question, {"role": "assistant", "content": "yes" if number % 2 else "no"}]}


def run_in(folder: Path, task: dict[str, Any], resume: bool = False, **fields: Any) -> Trained:
    run = RunFolder(folder, resume)
    try:
        return train(TrainConfig(**{**task, **fields}), run)
    finally:
        run.close()


@contextmanager
def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop the runs in the block during the step after ``steps`` steps."""
    stop, step = Stop(), QloraTrainer.training_step

    def stopping(self: Any, *args: Any) -> Any:
        stop.requested |= self.state.global_step == steps
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(QloraTrainer, "training_step", stopping)
        patched.setattr(run_module, "Stop", lambda: stop)
        yield
