"""Compares a whole run on a GPU with the same run on the CPU. Skipped without a GPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import TrainingOutOfResources
from adapters.training import RunFolder
from tests.support.training_tasks import run_in, stopping_after

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
four_bits = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(autouse=True)
def no_bound_afterwards() -> Iterator[None]:
    """Removes the memory limit that a run sets for its process, which is the test's process here."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def losses(folder: Path) -> list[float]:
    return list(RunFolder(folder, resume=True).curve("step").values())


def notes(folder: Path) -> str:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return " ".join(event["message"] for event in events if event["event"] == "note")


@pytest.mark.parametrize("quantization", [pytest.param("nf4", marks=four_bits), "none"])
@pytest.mark.parametrize("recomputing", ["on", "off"])
def test_a_gpu_learns_what_the_cpu_learns(
    task: dict[str, Any], tmp_path: Path, quantization: str, recomputing: str
) -> None:
    packs: dict[str, Any] = {
        "packing": True,
        "max_seq_len": 64,
        "batch_size": 1,
        "accumulation": 2,
        "max_steps": 12,
    }
    fields: dict[str, Any] = {"quantization": quantization, "gradient_checkpointing": recomputing, **packs}
    for device in ("cpu", GPU):
        done = run_in(tmp_path / device, task, device=device, **fields)
        assert done.folder is not None
    ours, theirs = losses(tmp_path / GPU), losses(tmp_path / "cpu")
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert ours[-1] < ours[0] / 2
    told = notes(tmp_path / GPU)
    assert "GPU memory: at most" in told
    assert "Optimiser: AdamW" in told
    assert "Attention: " in told


@pytest.mark.parametrize("quantization", [pytest.param("nf4", marks=four_bits), "none"])
def test_a_stopped_run_on_a_gpu_is_resumed(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    fields: dict[str, Any] = {"device": GPU, "quantization": quantization}
    run_in(tmp_path / "whole", task, **fields)
    with stopping_after(6, monkeypatch):
        assert run_in(tmp_path / "halves", task, **fields).folder is None
    assert run_in(tmp_path / "halves", task, resume=True, **fields).folder is not None
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=0.1)


def test_a_run_keeps_to_its_memory_limit(task: dict[str, Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"device": GPU, "quantization": "none"}
    run_in(tmp_path / "roomy", task, gpu_memory=4 << 30, **fields)
    with pytest.raises(TrainingOutOfResources, match="--train-gpu"):
        run_in(tmp_path / "tight", task, gpu_memory=64 << 20, **fields)
