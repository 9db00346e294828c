"""Says what a folder is if it is not a PEFT adapter, and what to do about it.

It reads only file names and the first bytes of files, and follows no links. It is called when a folder cannot
be read or lacks a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE, open_file, open_folder, read_exactly
from adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from adapters.strict_json import JsonInvalid, parse_json

MAX_ENTRIES = 2000
"""The most entries of a folder that are checked."""

_HEAD_BYTES = 512
_CONFIG_BYTES = 2**20

_CONVERT = (
    "which can run code when it is read, so it is never read; convert it where you trust it: "
    f'safetensors.torch.save_file(torch.load({{}}, weights_only=True), "{WEIGHTS_FILE}")'
)
_BY_BYTES: dict[re.Pattern[bytes], str] = {
    re.compile(rb"\Z"): "is empty; copy it again",
    re.compile(rb"\0{8}"): "begins with zeros: its copy or download was not finished; copy it again",
    re.compile(rb"version https://git-lfs"): (
        "is a Git LFS pointer, not the file itself; run 'git lfs pull' in the clone that it comes from, or "
        "fetch the adapter with 'hf download', and copy it again"
    ),
    re.compile(rb"/annex/objects/"): (
        "is a git-annex pointer, not the file itself; run 'git annex get' in its clone, and copy it again"
    ),
    re.compile(rb"\s*(?:<!doctype|<html|<head|<\?xml|<!--)", re.IGNORECASE): (
        "is a web page: the download was refused, or its address is the page's and not the file's "
        "(…/resolve/…, not …/blob/…); fetch it again with 'hf download'"
    ),
    re.compile(rb"GGUF"): (
        "is a GGUF file of llama.cpp; deploy the PEFT folder that it was made from, or train one"
    ),
    re.compile(rb"PK\x03\x04"): f"is a ZIP archive, probably a pickle from torch.save, {_CONVERT}",
    re.compile(rb"\x80[\x02-\x05]"): f"is a pickle, {_CONVERT}",
    re.compile(rb"\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!|(?s:.{257})ustar"): (
        "is a compressed file or an archive; unpack it"
    ),
}
_TEXT = re.compile(rb"[\t\r\n -~]{1,64}")
_JSON = re.compile(rb"\s*[{\[\"]")

_MLX = (
    "an mlx-lm adapter ({}). Convert it to a PEFT folder: transpose each lora_a and lora_b, name them "
    "base_model.model.<module>.lora_A.weight and lora_B.weight, and set lora_alpha to scale times rank"
)
_BY_NAMES: dict[re.Pattern[str], str] = {
    re.compile(r"(?:\d+_)?adapters\.(?:safetensors|npz)"): _MLX,
    re.compile(r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json"): (
        "an adapter in several parts ({}). Load it with PEFT and save it with save_pretrained as one file"
    ),
    re.compile(r"adapter_model\.(?:bin|pth?)"): (
        "an adapter saved as a pickle ({0}), " + _CONVERT.replace("{}", "{0}")
    ),
    re.compile(r"(?s:.+)\.gguf"): (
        "a GGUF adapter or model of llama.cpp ({}). Deploy the PEFT folder that it was made from, or train "
        "one"
    ),
    re.compile(r"pytorch_model_fsdp.*|.+\.distcp|global_step\d+|zero_to_fp32\.py|mp_rank_.+"): (
        "a checkpoint of FSDP or DeepSpeed ({}). Gather its shards (accelerate merge-weights or "
        "zero_to_fp32.py), then save the adapter with PEFT's save_pretrained"
    ),
    re.compile(
        r"(?:model|pytorch_model|consolidated)(?:[-.]\d+(?:-of-\d+)?)?\.(?:safetensors|bin|pth)(\.index\.json)?"
    ): (
        "a whole model ({}), not an adapter. Save the adapter before it is merged (no merge_and_unload), or "
        "serve the model itself with --base"
    ),
    re.compile(r"(?s:.+)\.(?:zip|tar|tgz|tar\.\w+|7z|rar|zst)"): "an archive ({}). Unpack it into the folder",
    re.compile(r"(?s:.+)\.safetensors"): (
        f"without {WEIGHTS_FILE}, but with {{}}. If PEFT's save_pretrained wrote that, rename it"
    ),
}


def recognise(folder: Path) -> AdapterError | None:
    """What the folder is, if it is clearly not a PEFT adapter. None if it is one or may still become one."""
    with suppress(AdapterError), open_folder(folder) as descriptor:
        return _recognise(descriptor)
    return None


@contextmanager
def recognise_on_error(folder: int) -> Iterator[None]:
    """Replaces an error raised inside by what ``recognise`` finds in the opened folder, if anything."""
    try:
        yield
    except (AdapterInvalid, AdapterUnsupported, AdapterTooLarge) as error:
        known = _recognise(folder)
        if known is None:
            raise
        raise known from error


def _recognise(folder: int) -> AdapterError | None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (kind := _kind_of(folder, name)) is not None:
            return AdapterInvalid(f"{name} {kind}.")
    config = _config(folder)
    if config is not None and not config.get("peft_type"):
        if config.keys() & {"fine_tune_type", "lora_parameters", "lora_layers", "adapter_path"}:
            return _unsupported(_MLX, CONFIG_FILE)
        if config.keys() & {"architectures", "model_type"}:
            return _unsupported("without PEFT's config: {} is a model's. Save it with PEFT", CONFIG_FILE)
    if _exists(folder, CONFIG_FILE) and _exists(folder, WEIGHTS_FILE):
        return None
    return _by_names(folder)


def _by_names(folder: int) -> AdapterError | None:
    entries = _entries(folder)
    names = sorted({name for name, _ in entries} - {WEIGHTS_FILE})
    if not _exists(folder, CONFIG_FILE):
        folders = (name for name, is_folder in entries if is_folder)
        if deeper := [name for name in folders if _exists(folder, f"{name}/{CONFIG_FILE}")]:
            return _one_deeper(sorted(deeper, key=_numbers))
        if {"blobs", "snapshots"}.issubset(names):
            return AdapterInvalid(
                "The folder is the hub's cache, whose files are links; fetch the adapter with "
                "'hf download … --local-dir <folder>'."
            )
    for pattern, kind in _BY_NAMES.items():
        if found := next((name for name in names if pattern.fullmatch(name)), None):
            return _unsupported(kind, found)
    return None


def _one_deeper(folders: list[str]) -> AdapterInvalid:
    if len(folders) == 1:
        return AdapterInvalid(
            f"The adapter is one folder deeper, in {folders[0]!r:.100}; move that folder into the "
            "adapter folder."
        )
    shown = ", ".join(f"{name!r:.100}" for name in folders[-3:])
    return AdapterInvalid(
        f"The folder is not an adapter, but contains {len(folders)} of them "
        f"({'…, ' * (len(folders) > 3)}{shown}); move the one to serve into the adapter folder."
    )


def _unsupported(kind: str, name: str) -> AdapterUnsupported:
    return AdapterUnsupported(f"The folder is {kind.format(f'{name!r:.100}')}.")


def _kind_of(folder: int, name: str) -> str | None:
    """What the file is instead, as "is a …". None if it is what its name says, or if it cannot be opened."""
    head = _head(folder, name)
    if head is None or (name == WEIGHTS_FILE and head[8:9] == b"{" and head[7] == 0):
        return None
    for pattern, kind in _BY_BYTES.items():
        if pattern.match(head):
            return kind.format(repr(name))
    if _TEXT.fullmatch(head[:64]) and (name == WEIGHTS_FILE or not _JSON.match(head)):
        what = "tensors" if name == WEIGHTS_FILE else "JSON"
        return f"is text, not {what}; it may be the error page of a failed download, so fetch it again"
    return None


def _head(folder: int, name: str) -> bytes | None:
    with suppress(AdapterError), open_file(folder, name, 2**63) as (stream, size):
        return bytes(read_exactly(stream, min(size, _HEAD_BYTES), name))
    return None


def _config(folder: int) -> dict[str, object] | None:
    with suppress(AdapterError, JsonInvalid), open_file(folder, CONFIG_FILE, _CONFIG_BYTES) as (stream, size):
        value = parse_json(read_exactly(stream, size, CONFIG_FILE))
        return value if isinstance(value, dict) else None
    return None


def _entries(folder: int) -> list[tuple[str, bool]]:
    with suppress(OSError), os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, MAX_ENTRIES)]
    return []


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return True


def _numbers(name: str) -> tuple[list[int], str]:
    """A sort key that puts ``checkpoint-1000`` after ``checkpoint-200``."""
    return [int(number) for number in re.findall(r"\d{1,18}", name)], name
