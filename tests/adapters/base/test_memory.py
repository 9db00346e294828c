"""A base that does not fit is refused before its weights are read, with the bytes that are missing."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from adapters.base import load_base, memory, prepare_base
from adapters.base.memory import free_memory, loaded_bytes
from adapters.errors import BaseTooLarge

Usage = namedtuple("Usage", "free")


def no_weights(*_: Any, **__: Any) -> None:
    raise AssertionError("the weights are read")


def test_what_a_base_takes_in_memory_is_what_its_tensors_take(llama: Path, tmp_path: Path) -> None:
    for quantization in ("none", "nf4"):
        prepared = prepare_base(str(llama), tmp_path, quantization, progress=False)
        model = load_base(prepared).model
        found = sum(tensor.nbytes for name, tensor in model.state_dict().items())
        assert loaded_bytes(prepared.path) == pytest.approx(found, rel=0.01)


def test_loading_says_how_many_bytes_are_missing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_base(str(llama), tmp_path, "none", progress=False)
    needed = loaded_bytes(prepared.path)
    monkeypatch.setattr("adapters.base.load.load_whole", no_weights)
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1234)
    with pytest.raises(BaseTooLarge, match=r"\(1234 bytes\) is missing.*--quantization nf4"):
        load_base(prepared)


def test_preparing_says_how_many_bytes_are_missing_and_keeps_what_is_done(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda: 10_000)
        patch.setattr("adapters.base.skeleton.Skeleton.convert", no_weights)
        with pytest.raises(BaseTooLarge, match=r"To quantise .* takes .* 0\.00 GB \(10000 bytes\) of memory"):
            prepare_base(str(llama), tmp_path, progress=False)
    assert [path.suffix for path in (tmp_path / "bases").iterdir() if path.is_dir()] == [".partial"]
    load_base(prepare_base(str(llama), tmp_path, progress=False))


def test_a_full_disk_is_noticed_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(500))
    monkeypatch.setattr("adapters.base.skeleton.Skeleton.convert", no_weights)
    with pytest.raises(BaseTooLarge, match=r"\(500 bytes\) of disk space at .* is missing\. Free some"):
        prepare_base(str(llama), tmp_path, progress=False)


def test_the_files_that_a_group_has_cached_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    everything = free_memory()
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 200\ninactive_file 50000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory() == 100_000 + 50_200
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == pytest.approx(everything, rel=0.2)
