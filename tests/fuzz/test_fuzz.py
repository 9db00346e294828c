"""No input of the corpus shows a fault. The slow tests fuzz each target."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.fuzz.__main__ import TARGETS as NAMES
from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS
from tests.support.project import ROOT

SECONDS = 12


def test_every_target_can_be_fuzzed() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("target", NAMES)
def test_the_corpus(target: str) -> None:
    inputs = seeds.read(target)
    assert inputs
    for data in inputs:
        TARGETS[target](data)


@pytest.mark.slow
@pytest.mark.parametrize("target", NAMES)
def test_fuzzing(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris")
    monkeypatch.chdir(tmp_path)  # libFuzzer leaves an input that shows a fault here
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = tmp_path / "found"
    found.mkdir()
    assert fuzz(target, SECONDS, found) == 0, [path.read_bytes() for path in tmp_path.glob("crash-*")]
