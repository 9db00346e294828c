"""Whole runs on a tiny base. PEFT loads the folder of every method, and it equals the trained weights."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from adapters.artifact import Limits, inspect_adapter
from adapters.base import LoadedBase, load_base, prepare_base
from adapters.errors import RunFolderInvalid, TrainingDiverged, TrainingOutOfResources
from adapters.training import RunFolder, TrainConfig, progress
from adapters.training import run as run_module
from adapters.training import trainer as trainer_module
from adapters.training.export import pairs_of
from adapters.training.progress import Throttle
from adapters.training.run import train
from adapters.training.run_folder import EventKind
from tests.support.training_tasks import QUESTIONS, row, run_in, stopping_after

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(task: dict[str, Any]) -> LoadedBase:
    return load_base(prepare_base(task["base"], task["home"], progress=False))


def events(folder: Path, kind: EventKind) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def loaded(base: LoadedBase, folder: Path) -> Any:
    """The model with the adapter that PEFT loads, in training mode (``evaluating``), without gradients."""
    return PeftModel.from_pretrained(base.model, folder).train()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def test_fields_that_are_not_used_are_noted(task: dict[str, Any], tmp_path: Path) -> None:
    asked, answer = row(1)["messages"]
    rows = [{"messages": [{**asked, "name": "ada"}, {**answer, "thinking": "odd"}]}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(rows))
    run_in(tmp_path / "run", task, data=data, eval_data=None, max_steps=1)
    notes = [event["message"] for event in events(tmp_path / "run", "note")]
    for field in ("messages[].name", "messages[].reasoning_content"):
        assert f"rows.jsonl: the field {field!r} of 1 rows is not used." in notes


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora"])
def test_the_folder_is_what_was_trained(
    task: dict[str, Any], base: LoadedBase, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.Tensor] = []
    finish = run_module._finish

    def keeping_logits(*args: Any) -> Any:
        model = args[3].model.train()
        with torch.autocast("cpu", torch.bfloat16):
            trained.append(logits(model))
        return finish(*args)

    monkeypatch.setattr(run_module, "_finish", keeping_logits)
    done = run_in(tmp_path / "run", task, method=method)
    assert done.folder is not None
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps] == list(range(1, 13))
    model = loaded(base, done.folder)
    with torch.autocast("cpu", torch.bfloat16):
        served = logits(model)
    plain = logits(model.unload())
    moved = (trained[0] - plain).abs().max()
    assert (trained[0] - served).abs().max() < 0.1 * moved + 0.05  # tensors are rounded to bf16
    assert moved > 0.2
    if method != "dora":
        info = inspect_adapter(done.folder, base.layout, Limits(64, 1 << 20), torch.bfloat16)
        assert set(info.ranks) <= set(base.layout.sites)
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    card = (done.folder / "README.md").read_text()
    assert base.prepared.digest in card
    assert "library_name: peft" in card


def test_adalora_moves_ranks(task: dict[str, Any], base: LoadedBase, tmp_path: Path) -> None:
    done = run_in(tmp_path / "run", task, method="adalora")
    assert done.folder is not None
    model = loaded(base, done.folder)
    ranks = [pair.rank for pair in pairs_of(model).values()]
    model.unload()
    assert sum(ranks) <= task["r"] * len(base.layout.sites)  # the budget is a mean
    assert len(set(ranks)) > 1


def test_pruning_keeps_the_loss_within_its_limit(task: dict[str, Any], tmp_path: Path) -> None:
    done = run_in(tmp_path / "run", task, prune_rank=0.05)
    pruned = done.metrics["pruned"]
    assert pruned["rows_after"] < pruned["rows_before"]
    assert pruned["bytes_after"] < pruned["bytes_before"]
    assert pruned["loss_after"] <= pruned["loss_before"] + 0.05
    (event,) = events(tmp_path / "run", "pruned")
    assert f"to {pruned['rows_after']} rank rows" in event["message"]


def test_packing_and_accumulation_learn_too(task: dict[str, Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "packing": True,
        "max_seq_len": 64,
        "batch_size": 1,
        "accumulation": 2,
        "max_steps": 12,
    }
    done = run_in(tmp_path / "run", task, **fields)
    losses = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert losses[-1] < losses[0] / 2
    assert done.metrics["rows"] == QUESTIONS


def test_options_that_save_memory_give_the_same_curve(task: dict[str, Any], tmp_path: Path) -> None:
    """Packed weights and recomputed activations. Evaluations must not repack the weights.

    The head is in 4 bits too.
    """
    task = {**task, "head_quantization": "nf4"}
    curves = []
    for name, choice in (("plain", "off"), ("frugal", "on")):
        unpack = "on" if choice == "off" else "off"
        run_in(tmp_path / name, task, gradient_checkpointing=choice, cache_dequantized=unpack, epochs=2.0)
        kinds: tuple[EventKind, ...] = ("step", "eval")
        curves.append([event["loss"] for kind in kinds for event in events(tmp_path / name, kind)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_a_resumed_run_has_the_same_curve(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA has the most state. A test in ``tests/server/finetune/command`` kills a run of plain LoRA."""
    fields: dict[str, Any] = {"method": "adalora", "dropout": 0.1}  # dropout needs the random state too
    run_in(tmp_path / "whole", task, **fields)
    with stopping_after(6, monkeypatch):
        assert run_in(tmp_path / "halves", task, **fields).folder is None
    assert [event["step"] for event in events(tmp_path / "halves", "checkpoint")][-1] == 7
    assert run_in(tmp_path / "halves", task, resume=True, **fields).folder is not None
    whole, halves = (RunFolder(tmp_path / name, resume=True).curve("step") for name in ("whole", "halves"))
    assert whole == halves


def test_a_run_is_resumed_only_with_the_same_settings(task: dict[str, Any], tmp_path: Path) -> None:
    run_in(tmp_path / "run", task, max_steps=1)
    with pytest.raises(RunFolderInvalid, match="--resume"):
        run_in(tmp_path / "run", task, max_steps=1)
    with pytest.raises(RunFolderInvalid, match="another learning_rate, seed"):
        run_in(tmp_path / "run", task, resume=True, max_steps=1, learning_rate=1e-3, seed=3)


def failing_at(step: int, error: Exception, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Make ``method`` of the trainer raise ``error`` from ``step`` on."""
    real = getattr(trainer_module.QloraTrainer, method)

    def fails(self: Any, *args: Any) -> Any:
        if self.state.global_step >= step:
            raise error
        return real(self, *args)

    monkeypatch.setattr(trainer_module.QloraTrainer, method, fails)


@pytest.mark.parametrize(
    ("error", "method", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "training_step", "The GPU's memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "training_step", "Memory ran out"),
        (OSError(28, "No space left on device"), "_save", "is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "_save", "is full"),
    ],
)
def test_out_of_memory_or_disk_is_reported_with_the_last_good_checkpoint(
    task: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    method: str,
    reason: str,
) -> None:
    failing_at(4, error, monkeypatch, method)
    with pytest.raises(TrainingOutOfResources) as raised:
        run_in(tmp_path / "run", task, checkpoint_steps=2, eval_data=None)
    text = str(raised.value)
    assert reason in text
    (last,) = {path for path in (tmp_path / "run" / "checkpoints").iterdir() if str(path) in text}
    assert last.name == ("checkpoint-4" if method == "training_step" else "checkpoint-2")
    assert not (tmp_path / "run" / "checkpoints" / ".partial").exists()


def test_a_nan_loss_ends_the_run_before_the_weights_change(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.training_step

    def poisoned(self: Any, *args: Any) -> Any:
        loss = real(self, *args)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"The loss became nan in step 6; lower --lr.*checkpoint-4"):
        run_in(tmp_path / "run", task, checkpoint_steps=2)
    assert len(events(tmp_path / "run", "step")) == 5


def test_a_duty_cycle_leaves_time_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", slept.append)
    Throttle(0.25).pause()
    assert slept == [3.0]  # one second of work, three of rest


def test_checkpoint_events_have_losses_and_accuracies(task: dict[str, Any], tmp_path: Path) -> None:
    run_in(tmp_path, task)
    kinds: tuple[EventKind, ...] = ("checkpoint", "step", "eval")
    last, step, held_out = (events(tmp_path, kind)[-1] for kind in kinds)
    assert last["step"] == step["step"] == held_out["step"]
    assert (last["loss"], last["accuracy"]) == (step["loss"], step["accuracy"])
    assert (last["eval_loss"], last["eval_accuracy"]) == (held_out["loss"], held_out["accuracy"])
    accuracies = [event["accuracy"] for event in events(tmp_path, "step")]
    assert accuracies[0] < accuracies[-1] <= 1
    measured = [event["step"] for event in events(tmp_path, "eval")]
    assert len(measured) == len(set(measured)), "the same weights were evaluated twice"


def test_without_a_terminal_progress_is_lines(
    task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run = RunFolder(tmp_path / "run")
    train(TrainConfig(**{**task, "max_steps": 3}), run, show=True)
    run.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Step ")]
    assert [line.partition(":")[0] for line in lines] == [f"Step {step} of 3" for step in (1, 2, 3)]
    assert lines[-1].endswith("0 s left.")
