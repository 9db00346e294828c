"""docs/bases.md agrees with the code, for a tiny model of every causal LM class of transformers.

If a release of transformers, or a change here, makes a row wrong, check the row first. Then write the page
again with ``python -m tests.support.bases_page`` (two minutes).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from adapters.kernels.cpu import isa
from tests.support.base_rows import FUSED, Row, row_of
from tests.support.bases_page import PAGE, REGENERATE, line_of, lines_of
from tests.support.tiny_configs import MODEL_TYPES
from tests.support.tiny_exceptions import NOT_BUILT
from tests.support.tiny_zoo import tiny_model

LINES = lines_of(PAGE.read_text("utf-8"))
FAST = [
    "llama",
    "gemma2",
    "phi3",
    "gpt2",
    "mixtral",
    "deepseek_v3",
    "gemma3",
    "lfm2",
    "bloom",
    "doge",
    "roberta",
]
"""One model type for each outcome. The others are slow tests."""


def compare(row: Row) -> None:
    line = LINES[row.model_type]
    if isa() != "avx512bf16":  # the page is written on a machine that runs the fused step
        line = line.replace(f"| {FUSED} |", "| transformers |")
        row = replace(row, served="transformers" if row.served else "")
    assert line_of(row) == line, f"the row of {row.model_type} changed; if it is right, run {REGENERATE}"


@pytest.mark.parametrize("model_type", FAST)
def test_a_row_agrees_with_the_code(model_type: str, tmp_path: Path) -> None:
    compare(row_of(model_type, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(FAST)))
def test_every_row_agrees_with_the_code(model_type: str, tmp_path: Path) -> None:
    compare(row_of(model_type, tmp_path))


def test_the_page_has_every_class_of_transformers() -> None:
    missing, gone = set(MODEL_TYPES) - LINES.keys(), LINES.keys() - set(MODEL_TYPES)
    assert (missing, gone) == (set(), set()), f"transformers has other model types now; run {REGENERATE}"
    for model_type in MODEL_TYPES:
        assert f"| {Row(model_type).architecture} |" in LINES[model_type], REGENERATE


def test_the_page_names_the_version_it_was_made_with() -> None:
    assert f"transformers {version('transformers')}." in PAGE.read_text("utf-8"), f"run {REGENERATE}"


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_model_types_that_were_not_tried_cannot_be_built(model_type: str) -> None:
    if model_type == "gemma3n" and find_spec("timm") is not None:
        pytest.skip("it can be built with timm")
    with pytest.raises((ImportError, ValueError, AttributeError, StrictDataclassError)):
        tiny_model(model_type)
