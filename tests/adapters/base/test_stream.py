"""A base that is quantised layer by layer gets the bits of one that is quantised as a whole."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.base import Quantization, checkpoint, load_base, prepare_base, stream
from adapters.base.headers import INDEX, weight_files
from adapters.base.shard_folder import ShardFolder
from adapters.base.skeleton import CannotStream, Skeleton
from adapters.errors import BaseCorrupt, BaseNotFound
from tests.support.tiny_configs import MODEL_TYPES
from tests.support.tiny_exceptions import NOT_BUILT
from tests.support.tiny_models import FAMILIES, make_tiny_model
from tests.support.tiny_zoo import save_tiny_model

SPARSE = ("mixtral", "qwen3_moe")
JOINED = ("phi3", "gpt2")
NOT_LOADED = {"emu3", "mllama"}
"""transformers has no causal LM for the config that it saves with these."""


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    """The same model in several files."""
    folder = shutil.copytree(llama, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size="50KB")
    assert len(weight_files(folder)) > 3
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part gets a shard of its own."""
    monkeypatch.setattr(stream, "SHARD", 1)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def as_a_whole(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, head: Quantization = "none"
) -> Path:
    """The checkpoint that transformers makes of the whole model."""

    def cannot(*_: object) -> None:
        raise CannotStream("the test says so")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "plan_stream", cannot)
        return prepare_base(str(source), cache, head_quantization=head, progress=False).path


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    for file in expected.glob("*.json"):
        assert (found / file.name).read_text() == file.read_text(), file.name


@pytest.mark.parametrize("family", [*FAMILIES, *SPARSE, *JOINED])
@pytest.mark.parametrize("head", ["none", "nf4"])
def test_every_bit_is_that_of_the_whole_model(
    family: str,
    head: Quantization,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = make_tiny_model(family, tmp_path / "model")
    caplog.set_level(logging.INFO)
    streamed = prepare_base(str(source), tmp_path / "streamed", head_quantization=head, progress=False)
    assert "The whole model is loaded" not in caplog.text
    assert_same(streamed.path, as_a_whole(source, tmp_path / "whole", monkeypatch, head))
    assert "The whole model is loaded to quantise it: the test says so." in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - NOT_BUILT.keys() - NOT_LOADED))
def test_every_class_of_transformers_is_streamed(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_tiny_model(model_type, tmp_path / "model")
    caplog.set_level(logging.INFO)
    streamed = prepare_base(str(source), tmp_path / "streamed", progress=False)
    assert "The whole model is loaded" not in caplog.text
    assert_same(streamed.path, as_a_whole(source, tmp_path / "whole", monkeypatch))


@pytest.mark.usefixtures("small_shards")
def test_a_sharded_base_gives_a_sharded_checkpoint_of_the_same_bits(
    llama: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_base(str(sharded), tmp_path / "cache", progress=False)
    index = json.loads((prepared.path / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in prepared.path.glob("*.safetensors")}
    assert len(weight_files(prepared.path)) == 5  # embedding, two layers, norm, head
    assert not (prepared.path / "finished.json").exists()
    whole = as_a_whole(llama, tmp_path / "whole", monkeypatch)
    assert_same(prepared.path, whole)
    prompt = torch.arange(3, 23)[None]
    ours, theirs = load_base(prepared).model, AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours handles it."""


def killed_after(shards: int, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepare ``source`` and die while the next shard is written. Returns what is left."""
    add, done = ShardFolder.add, 0

    def dying(self: ShardFolder, name: str, tensors: Any) -> None:
        nonlocal done
        if done == shards:
            (self._folder / f"{name}.partial").write_bytes(b"half a shard")
            raise Killed
        add(self, name, tensors)
        done += 1

    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "add", dying)
        with pytest.raises(Killed):
            prepare_base(str(source), cache, progress=False)
    [partial] = (cache / "bases").glob("*.partial")
    assert len(list(partial.glob("*.safetensors"))) == shards
    return partial


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first tensor of each part that is converted."""
    parts: list[str] = []
    convert = Skeleton.convert

    def noted(self: Skeleton, keys: Any, device: torch.device) -> Any:
        parts.append(next(iter(keys)))
        return convert(self, keys, device)

    monkeypatch.setattr(Skeleton, "convert", noted)
    return parts


@pytest.mark.usefixtures("small_shards")
def test_after_a_kill_only_the_rest_is_done(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    killed_after(3, sharded, tmp_path / "cache", monkeypatch)
    before = list(converted)
    converted.clear()
    prepared = prepare_base(str(sharded), tmp_path / "cache", progress=False)
    assert len(before) == 4
    assert len(converted) == 2
    assert_same(prepared.path, as_a_whole(sharded, tmp_path / "whole", monkeypatch))
    assert not list(prepared.path.glob("*.partial"))


KILLED = """
import os, signal, sys
from pathlib import Path
from adapters.base import prepare_base, stream
from adapters.base.shard_folder import ShardFolder

add, stream.SHARD = ShardFolder.add, 1

def add_and_die(self, name, tensors):
    add(self, name, tensors)
    if name.startswith("model-00002"):
        os.kill(os.getpid(), signal.SIGKILL)

ShardFolder.add = add_and_die
prepare_base(sys.argv[1], Path(sys.argv[2]), progress=False)
"""


@pytest.mark.usefixtures("small_shards")
def test_after_a_real_sigkill(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    command = [sys.executable, "-c", KILLED, str(sharded), str(tmp_path / "cache")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    prepared = prepare_base(str(sharded), tmp_path / "cache", progress=False)
    assert len(converted) == 3
    assert_same(prepared.path, as_a_whole(sharded, tmp_path / "whole", monkeypatch))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_finished_shard_is_verified(
    damage: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    partial = killed_after(3, sharded, tmp_path / "cache", monkeypatch)
    shard = partial / "model-00002-of-00005.safetensors"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-7] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    converted.clear()
    prepared = prepare_base(str(sharded), tmp_path / "cache", progress=False)
    assert len(converted) == 3
    assert_same(prepared.path, as_a_whole(sharded, tmp_path / "whole", monkeypatch))


@pytest.mark.usefixtures("small_shards")
def test_shards_of_other_versions_are_made_again(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    killed_after(3, sharded, tmp_path / "cache", monkeypatch)
    converted.clear()
    monkeypatch.setattr(stream, "version", lambda _: "another")
    prepare_base(str(sharded), tmp_path / "cache", progress=False)
    assert len(converted) == 5


def test_progress_says_how_long_the_rest_takes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stream, "_LOG_SECONDS", 0.0)
    prepare_base(str(sharded), tmp_path / "cache", progress=False)
    assert caplog.text.count("Quantised ") == 4
    assert "s left" in caplog.text


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace or remove one tensor of a sharded model. The index still names it."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    content = load_file(file)
    del content[name]
    save_file(content | ({} if tensor is None else {name: tensor}), file, metadata={"format": "pt"})


def assert_refused(folder: Path, cache: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        prepare_base(str(folder), cache, progress=False)
    assert not [path for path in (cache / "bases").glob("*") if path.is_dir()]


def test_a_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    shard = weight_files(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(
        sharded, tmp_path / "cache", BaseCorrupt, rf"{shard.name} cannot be read as safetensors.*fetch"
    )


def test_an_index_that_names_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = weight_files(sharded)[1]
    shard.unlink()
    assert_refused(sharded, tmp_path / "cache", BaseNotFound, f"lacks {shard.name}, which")


def test_a_tensor_that_only_the_index_has(sharded: Path, tmp_path: Path) -> None:
    change(sharded, "model.layers.1.mlp.up_proj.weight", None)
    match = r"lacks 1 of the model's tensors.*layers\.1\.mlp\.up_proj"
    assert_refused(sharded, tmp_path / "cache", BaseCorrupt, match)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_the_wrong_shape(name: str, sharded: Path, tmp_path: Path) -> None:
    change(sharded, name, torch.zeros(96, 64) if "proj" in name else torch.zeros(32))
    assert_refused(sharded, tmp_path / "cache", BaseCorrupt, name)


def test_what_cannot_be_streamed_is_loaded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tied, but both in the file: only their values tell whether transformers ties them."""
    folder = make_tiny_model("llama", tmp_path / "model", tie_word_embeddings=True)
    content = load_file(folder / "model.safetensors")
    content["lm_head.weight"] = content["model.embed_tokens.weight"] + 0.25
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    caplog.set_level(logging.INFO)
    prepared = prepare_base(str(folder), tmp_path / "cache", progress=False)
    assert "lm_head.weight and model.embed_tokens.weight are tied, but both are in the files" in caplog.text
    assert_same(prepared.path, as_a_whole(folder, tmp_path / "whole", monkeypatch))


def test_a_conversion_that_fails_for_parts_is_done_as_a_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("another signature")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr("adapters.base.skeleton.convert_and_load_state_dict_in_model", fail)
    prepared = prepare_base(str(llama), tmp_path / "cache", progress=False)
    assert "The whole model is loaded to quantise it: TypeError (another signature)." in caplog.text
    assert load_base(prepared).model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
