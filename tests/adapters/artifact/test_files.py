"""Hostile and broken files, and what the digest covers."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, Limits, load_adapter
from adapters.artifact.header import header_limits, read_header
from adapters.artifact.plan import plan_adapter
from adapters.errors import AdapterChanged, AdapterInvalid, AdapterTooLarge
from tests.adapters.artifact.folders import LAYOUT, LIMITS, config, tensors, write_folder


def _load(folder: Path, **options: Any) -> Any:
    return load_adapter(folder, LAYOUT, LIMITS, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "adapter")


def test_other_files_are_ignored(folder: Path) -> None:
    (folder / "README.md").write_text("# hello")
    (folder / "optimizer.pt").write_bytes(b"\x80not a pickle")
    (folder / "adapter_model.bin").write_bytes(b"\x80never read beside the safetensors")
    assert _load(folder).info.rank == 4


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_linked_or_special_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(AdapterInvalid, match=f"{name} is missing"):
        _load(folder)
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(
        AdapterInvalid, match=rf"{name} cannot be opened \(.*\); it must be a regular file, not a link"
    ):
        _load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterInvalid, match=f"{name} is not a regular file"):
        _load(folder)


def test_a_missing_or_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for path in (tmp_path / "link", tmp_path / "nowhere", folder / CONFIG_FILE):
        with pytest.raises(AdapterInvalid, match="The adapter folder cannot be opened"):
            _load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json is not JSON"),
        ("[1]", "adapter_config.json must hold one JSON object, not a list"),
        ('{"r": NaN}', "NaN is not a JSON number"),
        ('{"r": 4, "r": 8}', "the key 'r' occurs twice"),
        ("[" * 100_000, "adapter_config.json is nested too deep; at most 128 levels"),
        ('{"r": ' + "1" * 401 + "}", "adapter_config.json has a number of 401 digits in 'r'; at most 64"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "a number of 401 digits in 'lora_alpha'; at most 64"),
        (
            '{"lora_alpha": 1e400}',
            "has the number 1e400 in 'lora_alpha'; that is more than a double can hold",
        ),
        ('{"revision": "\\ud800"}', r"has \\ud800 in a string, half of a surrogate pair"),
    ],
)
def test_configs_that_are_not_json_objects(folder: Path, text: str, message: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(AdapterInvalid, match=message):
        _load(folder)


def test_sizes_are_capped_before_reading(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 2**40)  # sparse: it takes no disk, but reading it would take memory
    with pytest.raises(AdapterTooLarge, match=rf"{WEIGHTS_FILE} has {2**40} bytes; at most"):
        _load(folder)
    os.truncate(folder / CONFIG_FILE, 2**20 + 1)
    with pytest.raises(AdapterTooLarge, match=f"{CONFIG_FILE} has 1048577 bytes"):
        _load(folder)


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128], **changes}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({}, 0, "contains no tensors"),
        ({"t": {"dtype": "F32"}}, 128, "the header's entry of tensor 't' is malformed"),
        ({"t": _entry(shape=[-4, -8])}, 128, "is malformed"),
        ({"t": _entry(shape=[4.0, 8])}, 128, "is malformed"),
        (
            {"t": _entry(shape=[1, 1, 4, 8])},
            128,
            r"the shape \[1, 1, 4, 8\]; at most 3 dimensions of at most",
        ),
        ({"t": _entry(shape=[0, 2**31])}, 0, r"the shape \[0, 2147483648\]; at most 3 dimensions"),
        ({"t": _entry(shape=[10**80])}, 128, r"has a number of 81 digits; at most 64 are read"),
        ({"t" * 513: _entry()}, 128, "is malformed"),
        ({"t": _entry(data_offsets=[0, 64])}, 64, "needs 128 bytes but has 64"),
        ({"t": _entry(data_offsets=[8, 136])}, 136, "leave holes or overlap"),
        ({"t": _entry()}, 200, "leave holes or overlap"),
        ({"t": _entry()}, 100, "truncated or damaged"),
        ({"t": _entry(), "u": _entry()}, 256, "leave holes or overlap"),
    ],
)
def test_inconsistent_headers_are_refused(
    folder: Path, header: dict[str, Any], body: int, message: str
) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * body)
    with pytest.raises(AdapterInvalid, match=message):
        _load(folder)


def _written(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 128)


def test_a_header_longer_than_the_base_allows_is_not_read(folder: Path) -> None:
    header = json.dumps({"t": _entry(), "__metadata__": {"notes": "x" * 2**21}}).encode()
    _written(folder, header)
    with pytest.raises(AdapterInvalid, match=rf"has {len(header)} bytes; at most \d+ are read, .* Save the"):
        _load(folder)


@pytest.mark.parametrize("objects", [b"[],", b'"t":{},', b'"[[",'])
def test_a_header_with_more_objects_than_the_base_allows_is_not_parsed(
    objects: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.strict_json.json", None)
    header = b"[" + objects * 20_000
    stream = io.BytesIO(struct.pack("<Q", len(header)) + header)
    with pytest.raises(AdapterInvalid, match="describes more tensors than this base has modules for"):
        read_header(stream, 2**20, header_limits(LAYOUT))


def test_a_header_of_everything_that_peft_can_write_is_read() -> None:
    names = [*LAYOUT.sites, *LAYOUT.embedding_and_head, *LAYOUT.norms]
    wrapped = "base_model.model._orig_mod._fsdp_wrapped_module._checkpoint_wrapped_module." + "x" * 150
    entries = {
        f"{wrapped}.{name}.{role}": _entry(data_offsets=[128 * i, 128 * i + 128])
        for i, (name, role) in enumerate(itertools.product(names, "abcdef"))
    }
    text = json.dumps(entries | {"__metadata__": {"notes": "[" * 1000}}).encode()
    stream = io.BytesIO(struct.pack("<Q", len(text)) + text)
    size = 8 + len(text) + 128 * len(entries)
    assert len(read_header(stream, size, header_limits(LAYOUT)).entries) == len(entries)


@pytest.mark.parametrize("number", ["9" * 20, "9" * 1000, "9" * 4000, "1", str(2**31 - 1)])
@pytest.mark.parametrize("dimensions", [3, 4, 10_000])
def test_no_arithmetic_on_large_shapes(folder: Path, number: str, dimensions: int) -> None:
    shape = ",".join([number] * dimensions)[:50_000].rstrip(",")
    entry = '"t%d":{"dtype":"F32","shape":[%s],"data_offsets":[0,128]}'
    count = max(1, 900_000 // len(shape + entry))
    _written(folder, ("{" + ",".join(entry % (i, shape) for i in range(count)) + "}").encode())
    begun = time.monotonic()
    with pytest.raises(AdapterInvalid):
        _load(folder)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"\xff" * 8 + b"{}", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_files_that_are_not_safetensors(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(AdapterInvalid, match=WEIGHTS_FILE):
        _load(folder)


def test_a_file_written_to_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch_and_plan(*args: Any) -> Any:
        os.utime(folder / WEIGHTS_FILE, ns=(1, 1))
        return plan_adapter(*args)

    monkeypatch.setattr("adapters.artifact.load.plan_adapter", touch_and_plan)
    with pytest.raises(AdapterChanged, match=f"{WEIGHTS_FILE} was written to while it was read"):
        _load(folder)


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    _load(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"broken")
    with pytest.raises(AdapterInvalid):
        _load(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_digest_covers_the_content_that_is_served(folder: Path, tmp_path: Path) -> None:
    digest = _load(folder).info.digest
    same = write_folder(tmp_path / "same", config(lora_dropout=0.5, target_modules=["v_proj", "q_proj"]))
    os.utime(same / WEIGHTS_FILE, ns=(1, 1))
    scaled = write_folder(tmp_path / "scaled", config(lora_alpha=9))
    retrained = write_folder(tmp_path / "retrained", weights=tensors(seed=1))
    assert _load(same).info.digest == digest
    assert len({digest, _load(scaled).info.digest, _load(retrained).info.digest}) == 3


def test_content_must_match_the_expected_digest(folder: Path) -> None:
    digest = _load(folder).info.digest
    assert _load(folder, expect_digest=digest).info.digest == digest
    write_folder(folder, weights=tensors(seed=1))
    with pytest.raises(AdapterChanged, match="no longer what was registered"):
        _load(folder, expect_digest=digest)


def test_weights_own_their_memory(folder: Path) -> None:
    for pair in _load(folder, dtype=torch.float32).weights.values():
        for tensor in (pair.a, pair.b):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_wide_file_may_be_larger_than_what_is_served(folder: Path) -> None:
    assert (folder / WEIGHTS_FILE).stat().st_size > 208
    assert load_adapter(folder, LAYOUT, Limits(max_rank=4, max_bytes=208)).info.nbytes == 208
