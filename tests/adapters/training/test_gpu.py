"""The decisions of a run on a GPU, tested without one. torch's answers about the device are faked."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from adapters.base.unpack import four_bit_linears
from adapters.errors import RecipeInvalid, TrainingOutOfResources
from adapters.training import RunFolder, TrainConfig, arguments
from adapters.training.card import _version
from adapters.training.failures import explain_failures
from adapters.training.gpu import claim_memory, free_gpu_memory, optimizer_for, release_memory
from adapters.training.resources import choose_device, decide_recomputing, decide_unpacking
from tests.support.tiny_models import TinyBase

GIB = 1 << 30
CONFIG = TrainConfig(data=Path("train.jsonl"))


@dataclasses.dataclass
class Gpu:
    """A GPU of 80 GiB. Other processes hold some of it."""

    free: int
    total: int = 80 * GIB
    used: int = 0
    fraction: float = 1.0

    def bound(self, fraction: float, _device: str) -> None:
        self.fraction = fraction


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Gpu]:
    def there_is(free: int) -> Gpu:
        made = Gpu(free)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (made.free, made.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: made.used)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: made.used)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", made.bound)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: made.fraction)
        return made

    return there_is


@pytest.fixture
def bitsandbytes_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def make(cuda: bool) -> None:
        extension = SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=cuda))
        monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", extension)

    return make


def test_the_optimiser_is_paged_in_8_bits_if_possible(bitsandbytes_with: Callable[[bool], None]) -> None:
    bitsandbytes_with(True)
    assert optimizer_for("cuda:0")[0] == "paged_adamw_8bit"
    assert optimizer_for("cpu")[0] == "adamw_torch"
    bitsandbytes_with(False)
    name, reason = optimizer_for("cuda:0")
    assert name == "adamw_torch_fused"
    assert "no kernels for CUDA" in reason


def test_without_bitsandbytes_bf16_bases_are_trained(
    tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, find = tiny_base("llama").model, importlib.util.find_spec
    assert four_bit_linears(model)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    name, reason = optimizer_for("cuda:0")
    assert name == "adamw_torch_fused"
    assert "bitsandbytes is not installed" in reason
    assert four_bit_linears(model) == {}
    assert _version("a-package-that-is-not-there") is None
    release_memory()


@pytest.mark.parametrize(("visible", "devices"), [(1, 1), (4, 1)])
def test_the_trainer_gets_the_arguments_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bitsandbytes_with: Callable[[bool], None],
    visible: int,
    devices: int,
) -> None:
    """The names are those that transformers accepts. One process never uses several GPUs."""
    bitsandbytes_with(True)

    class Recorded(SimpleNamespace):
        def __init__(self, **given: Any) -> None:
            super().__init__(given=given, _n_gpu=visible)

        @property
        def n_gpu(self) -> int:
            return int(self._n_gpu)

    monkeypatch.setattr(arguments, "TrainingArguments", Recorded)
    made = arguments.training_arguments(CONFIG, tmp_path, "cuda:0", steps=10, rate=1e-4)
    given = made.given
    assert given.keys() <= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert given["optim"] in {name.value for name in OptimizerNames}
    assert (given["optim"], given["bf16"], given["use_cpu"]) == ("paged_adamw_8bit", True, False)
    assert given["dataloader_pin_memory"]
    assert given["per_device_train_batch_size"] == CONFIG.batch_size
    assert made.n_gpu == devices


def checkpoint(folder: Path, size: int) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)  # sparse: it takes no disk
    return folder


@pytest.mark.parametrize(("wanted", "limit"), [(None, 18 * GIB), (12 * GIB, 12 * GIB)])
def test_a_run_never_takes_more_than_is_free(
    gpu: Callable[[int], Gpu], tmp_path: Path, wanted: int | None, limit: int
) -> None:
    device = gpu(20 * GIB)
    said = claim_memory("cuda:0", wanted, checkpoint(tmp_path / "base", 5 * GIB))
    assert device.fraction * device.total == pytest.approx(limit)
    assert "20.0 GiB were free" in said
    device.used, device.free = 6 * GIB, 14 * GIB
    assert free_gpu_memory("cuda:0") == pytest.approx(limit - 6 * GIB)
    device.free = 1 * GIB  # other processes have taken it meanwhile
    assert free_gpu_memory("cuda:0") == pytest.approx(1 * GIB)


@pytest.mark.parametrize(
    ("free", "wanted", "reason"),
    [
        (4 * GIB, None, "needs at least 7.5 GiB .* may take 3.6 GiB .*--train-gpu"),
        (20 * GIB, 7 * GIB, "needs at least 7.5 GiB .* may take 7.0 GiB"),
        (20 * GIB, 24 * GIB, "--gpu-memory 24.0 GiB: 20.0 GiB of the GPU's 80.0 GiB are free"),
    ],
)
def test_a_gpu_that_is_too_full_is_refused_before_anything_is_loaded(
    gpu: Callable[[int], Gpu], tmp_path: Path, free: int, wanted: int | None, reason: str
) -> None:
    device = gpu(free)
    with pytest.raises(TrainingOutOfResources, match=reason):
        claim_memory("cuda:0", wanted, checkpoint(tmp_path / "base", 5 * GIB))
    assert device.fraction == 1.0


def test_activations_are_kept_only_in_the_runs_own_memory(
    gpu: Callable[[int], Gpu], tiny_base: TinyBase
) -> None:
    model = tiny_base("llama").model
    device = gpu(40 * GIB)
    assert not decide_recomputing(model, CONFIG, "cuda:0", 8192).on
    device.fraction = 2**20 / device.total
    short = decide_recomputing(model, CONFIG, "cuda:0", 8192)
    assert short.on
    assert "of 1 MiB free" in short.reason
    asked = dataclasses.replace(CONFIG, gradient_checkpointing="on")
    assert decide_recomputing(model, asked, "cuda:0", 1).on
    assert not decide_unpacking(model, CONFIG, "cuda:0").on


def test_cuda_is_refused_where_torch_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu", 0) == choose_device("auto", 1) == "cpu"
    with pytest.raises(RecipeInvalid, match="--device cpu"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == "cuda:1"
    assert choose_device("cpu", 1) == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_run_out_of_gpu_memory_ends_with_a_remedy(tmp_path: Path, error: Exception) -> None:
    run = RunFolder(tmp_path / "run")
    with (
        pytest.raises(TrainingOutOfResources, match="GPU's memory ran out; lower --batch-size"),
        explain_failures(run),
    ):
        raise error
    run.close()
