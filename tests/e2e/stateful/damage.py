"""Strategies that damage a good adapter folder on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Damage = Callable[[Path], None]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
"""Text that includes lone surrogates, NUL and newlines."""
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ANY_TEXT, inner, max_size=4)),
    max_leaves=8,
)
CONFIG_KEYS = st.sampled_from(
    ["r", "lora_alpha", "target_modules", "peft_type", "bias", "rank_pattern", "alpha_pattern", "task_type",
     "modules_to_save", "use_dora", "use_rslora", "layers_to_transform", "exclude_modules", "layers_pattern",
     "base_model_name_or_path", "target_parameters", "init_lora_weights", "fan_in_fan_out", "made_up"]
)  # fmt: skip
ENTRY_KEYS = st.sampled_from(["dtype", "shape", "data_offsets"])


def config_field(key: str, value: Any) -> Damage:
    def change(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(fields | {key: value}))

    return change


def without_field(key: str) -> Damage:
    def change(folder: Path) -> None:
        fields = json.loads((folder / CONFIG).read_text())
        fields.pop(key, None)
        (folder / CONFIG).write_text(json.dumps(fields))

    return change


def header_field(key: str, value: Any) -> Damage:
    """Change the header's entry of the first tensor."""

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        first = next(name for name in header if name != "__metadata__")
        header[first][key] = value
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return change


def bytes_at(file: str, share: float, data: bytes) -> Damage:
    """Overwrite bytes at a position, given as a share of the file's length."""

    def change(folder: Path) -> None:
        whole = bytearray((folder / file).read_bytes())
        place = int(share * len(whole))
        whole[place : place + len(data)] = data
        (folder / file).write_bytes(whole)

    return change


def cut(file: str, share: float) -> Damage:
    def change(folder: Path) -> None:
        os.truncate(folder / file, int(share * (folder / file).stat().st_size))

    return change


def replaced_by(file: str, kind: str) -> Damage:
    """Remove the file, or replace it by something that is not a regular file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        if kind == "link":
            (folder / file).symlink_to("/etc/passwd")
        elif kind == "loop":
            (folder / file).symlink_to(file)
        elif kind == "fifo":
            os.mkfifo(folder / file)
        elif kind == "folder":
            (folder / file).mkdir()

    return change


FILES = st.sampled_from([CONFIG, WEIGHTS])
SHARES = st.floats(0, 1, exclude_max=True)
DAMAGES: st.SearchStrategy[Damage] = st.one_of(
    st.builds(config_field, CONFIG_KEYS, ANY_JSON),
    st.builds(without_field, CONFIG_KEYS),
    st.builds(header_field, ENTRY_KEYS, ANY_JSON),
    st.builds(bytes_at, FILES, SHARES, st.binary(min_size=1, max_size=16)),
    st.builds(cut, FILES, SHARES),
    st.builds(replaced_by, FILES, st.sampled_from(["nothing", "link", "loop", "fifo", "folder"])),
)
