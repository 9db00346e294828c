"""Any content of the two files gives an adapter or an AdapterError, never another exception."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from adapters.artifact.fields import DECIDES, LABELS, REFUSED
from adapters.errors import AdapterError
from tests.adapters.artifact.folders import LAYOUT, LIMITS, Q, config, key, tensors, write_folder

# No operators of regular expressions, so that no example needs a child process.
TEXTS = st.text(st.sampled_from("qvprojlayersnm_.0 \n\x00é"), max_size=12)
NUMBERS = st.integers(-(10**19), 10**19) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["none", "all", "LORA", "pissa", "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(sorted(DECIDES | LABELS | REFUSED.keys())) | TEXTS
SHAPES = st.lists(st.integers(-1, 9) | st.integers(2**31 - 2, 2**64), max_size=4) | VALUES
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "x"]) | VALUES,
        "shape": SHAPES,
        "data_offsets": st.lists(st.integers(-8, 300), min_size=2, max_size=2) | VALUES,
    },
)
NAMES = st.sampled_from(
    [key(Q, "A"), key(Q, "B"), f"{Q}.weight", "lm_head.original_module.weight", "__metadata__"]
)
OFTEN = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("anything") / "a")


@OFTEN
@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_config(folder: Path, changes: dict[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps({**config(), **changes}))
    save_file(tensors(), folder / WEIGHTS_FILE)
    with suppress(AdapterError):
        load_adapter(folder, LAYOUT, LIMITS)


@OFTEN
@given(st.dictionaries(NAMES | TEXTS, ENTRIES | VALUES, max_size=4), st.binary(max_size=300))
def test_any_header(folder: Path, header: dict[str, Any], rest: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + rest)
    (folder / CONFIG_FILE).write_text(json.dumps(config()))
    with suppress(AdapterError):
        load_adapter(folder, LAYOUT, LIMITS)


@OFTEN
@given(st.lists(st.tuples(st.integers(0, 700), st.binary(max_size=4)), max_size=4), st.booleans())
def test_any_damage(folder: Path, damages: list[tuple[int, bytes]], cut: bool) -> None:
    write_folder(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        data = bytearray((folder / name).read_bytes())
        for place, new in damages:
            data[place : place + len(new)] = new
        (folder / name).write_bytes(data[: len(data) // 2] if cut else data)
        with suppress(AdapterError):
            load_adapter(folder, LAYOUT, LIMITS)
        write_folder(folder)
