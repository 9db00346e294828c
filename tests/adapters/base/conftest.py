"""The tiny base that the tests of this room prepare, load and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama. Leave its files as they are."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the base's folder, which the test may change."""
    return shutil.copytree(llama, tmp_path / "changed")
