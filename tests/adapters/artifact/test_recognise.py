"""A folder or file that is not a PEFT adapter is refused at once. The error says what it is."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from adapters.artifact.recognise import recognise
from adapters.errors import AdapterError, AdapterInvalid, AdapterUnsupported
from tests.adapters.artifact.folders import LAYOUT, LIMITS, config, tensors, write_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 162336\n" % (b"0" * 64)


def _archive() -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", "")
        return stream.getvalue()


def _tar() -> bytes:
    with io.BytesIO() as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("adapter_model.safetensors"))
        return stream.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty; copy it again"),
    "zeros": (b"\0" * 4096, "begins with zeros: its copy or download was not finished"),
    "Git LFS": (LFS, r"is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
    "git-annex": (b"/annex/objects/SHA256E-s1--0.safetensors\n", "is a git-annex pointer"),
    "a page": (b"<!DOCTYPE html>\n<html>", "is a web page: the download was refused.*hf download"),
    "S3's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 100, "is a GGUF file of llama.cpp"),
    "torch.save": (_archive(), r"is a ZIP archive.*convert it.*torch.load\('adapter_"),
    "a pickle": (pickle.dumps({"a": 1}), "is a pickle, which can run code"),
    "gzip": (gzip.compress(b"x"), "is a compressed file or an archive; unpack it"),
    "tar": (_tar(), "is a compressed file or an archive; unpack it"),
    "the hub's error": (
        b"Invalid username or password.",
        r"is text, not (tensors|JSON); it may be the error page",
    ),
}


def _refused(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, LAYOUT, LIMITS)
    return error.value


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind(kind: str, name: str, tmp_path: Path) -> None:
    data, reason = FILES[kind]
    folder = write_folder(tmp_path / "a")
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterInvalid, match=rf"^{name} {reason}"):
        load_adapter(folder, LAYOUT, LIMITS)
    assert str(recognise(folder)) == str(_refused(folder))


def test_a_json_error_in_the_place_of_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / WEIGHTS_FILE).write_text('{"error":"Repository not found"}' + " " * 100)
    assert "is text, not tensors" in str(_refused(folder))


MLX = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "lora_parameters": {"rank": 8, "scale": 20.0},
    "model": "a/b",
}


def _mlx(folder: Path) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(MLX))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(8, 4)}, folder / "adapters.safetensors")


def _mlx_renamed(folder: Path) -> None:
    _mlx(folder)
    (folder / "adapters.safetensors").rename(folder / WEIGHTS_FILE)


def _holding(*names: str, settings: Any = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"something")
        if settings is not None:
            (folder / CONFIG_FILE).write_text(json.dumps(settings))

    return make


def _deeper(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "README.md").write_text("# run")
        (folder / "runs").mkdir()
        for name in names:
            write_folder(folder / name)

    return make


def _model(folder: Path) -> None:
    write_folder(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


FOLDERS: dict[str, tuple[Callable[[Path], None], type[AdapterError], str]] = {
    "mlx-lm": (_mlx, AdapterUnsupported, r"is an mlx-lm adapter .*transpose.*lora_alpha to scale times rank"),
    "mlx-lm, renamed": (_mlx_renamed, AdapterUnsupported, "is an mlx-lm adapter"),
    "mlx-lm's checkpoint": (
        _holding("0000100_adapters.safetensors"),
        AdapterUnsupported,
        "an mlx-lm adapter",
    ),
    "one deeper": (
        _deeper("checkpoint-628"),
        AdapterInvalid,
        r"one folder deeper, in 'checkpoint-628'; move that folder into",
    ),
    "several deeper": (
        _deeper("checkpoint-1000", "checkpoint-200", "checkpoint-80", "checkpoint-9"),
        AdapterInvalid,
        r"contains 4 of them \(…, 'checkpoint-80', 'checkpoint-200', 'checkpoint-1000'\)",
    ),
    "the hub's cache": (
        _holding("blobs/x", "snapshots/y/z"),
        AdapterInvalid,
        "is the hub's cache.*--local-dir",
    ),
    "GGUF": (_holding("lora.gguf"), AdapterUnsupported, r"is a GGUF adapter or model .*\('lora.gguf'\)"),
    "a whole model": (
        _holding("config.json", "model.safetensors", settings=config()),
        AdapterUnsupported,
        r"is a whole model \('model.safetensors'\), not an adapter.*--base",
    ),
    "a whole model in parts": (
        _holding("config.json", "model-00001-of-00002.safetensors"),
        AdapterUnsupported,
        "is a whole model",
    ),
    "a whole model's pickles": (
        _holding("pytorch_model-00001-of-00002.bin"),
        AdapterUnsupported,
        "a whole model",
    ),
    "a model's config": (_model, AdapterUnsupported, "without PEFT's config: .* is a model's"),
    "a pickle": (
        _holding("adapter_model.bin", settings=config()),
        AdapterUnsupported,
        r"saved as a pickle.*torch.load\('adapter_model.bin', weights_only=True\), .adapter_model.saf",
    ),
    "parts": (_holding("adapter_model-00001-of-00002.safetensors"), AdapterUnsupported, "in several parts"),
    "FSDP": (
        _holding("pytorch_model_fsdp_0/__0_0.distcp"),
        AdapterUnsupported,
        "checkpoint of FSDP or DeepS",
    ),
    "DeepSpeed": (
        _holding("global_step10/x", "latest"),
        AdapterUnsupported,
        "checkpoint of FSDP or DeepSpeed",
    ),
    "an archive": (_holding("adapter.tar.gz"), AdapterUnsupported, "is an archive .*Unpack it"),
    "another name": (
        _holding("lora.safetensors", settings=config()),
        AdapterUnsupported,
        f"without {WEIGHTS_FILE}, but with 'lora.safetensors'. If PEFT's save_pretrained wrote that, rename",
    ),
    "bytes in a name": (
        _holding(os.fsdecode(b"\xff\n.gguf")),
        AdapterUnsupported,
        r"is a GGUF adapter or model of llama.cpp \('\\udcff\\n.gguf'\)",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind(kind: str, tmp_path: Path) -> None:
    make, error, reason = FOLDERS[kind]
    make(tmp_path / "a")
    with pytest.raises(error, match=reason):
        load_adapter(tmp_path / "a", LAYOUT, LIMITS)
    known = recognise(tmp_path / "a")
    assert known is not None
    assert str(known) == str(_refused(tmp_path / "a"))
    str(known).encode()


@pytest.mark.parametrize(
    "make",
    [
        _holding(),
        _holding("README.md", "tokenizer.json", "training_args.bin"),
        _holding(f"{WEIGHTS_FILE}.incomplete", ".cache/huggingface/x"),
        _holding("README.md", settings=config()),
        lambda folder: save_file(tensors(), folder / WEIGHTS_FILE),
        lambda folder: write_folder(folder) and None,
        lambda folder: write_folder(folder, config(peft_type="LOHA")) and None,
    ],
)
def test_adapters_and_incomplete_adapters_are_not_reported_as_another_kind(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    make(folder)
    assert recognise(folder) is None


def test_other_files_beside_an_adapter_are_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    for name in ("model.safetensors", "adapter_model.bin", "lora.gguf", "config.json"):
        (folder / name).write_bytes(LFS)
    write_folder(folder / "checkpoint-10")
    assert recognise(folder) is None
    assert load_adapter(folder, LAYOUT, LIMITS).info.rank == 4


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x8B1F])
def test_a_header_whose_length_looks_like_a_signature_is_a_header(length: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    size = int.from_bytes((folder / WEIGHTS_FILE).read_bytes()[:8], "little")
    data = (folder / WEIGHTS_FILE).read_bytes()
    header = data[8 : 8 + size].ljust(length)
    (folder / WEIGHTS_FILE).write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert recognise(folder) is None
    assert load_adapter(folder, LAYOUT, LIMITS).info.rank == 4


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(LFS)
    (tmp_path / "a").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "a" / name).symlink_to(tmp_path / "real")
    (tmp_path / "a" / "deeper").symlink_to(write_folder(tmp_path / "b"))
    assert recognise(tmp_path / "a") is None
    assert "must be a regular file, not a link. Copy the files that the links point to" in str(
        _refused(tmp_path / "a")
    )
