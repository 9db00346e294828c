"""Fixtures for all folders of tests. No test may reach the model hub."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.support")

from tests.support import sharding

os.environ |= {"HF_HUB_OFFLINE": "1"} | sharding.ENVIRON

from functools import cache
from pathlib import Path

from xdist.remote import Producer

from adapters.base import DEFAULT_BASE, LoadedBase, PreparedBase, load_base, prepare_base
from tests.support.project import ROOT
from tests.support.tiny_models import Family, TinyBase, make_tiny_model


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return sharding.num_workers(config.args)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> sharding.Scheduling:
    return sharding.Scheduling(config, log)


@pytest.fixture(scope="session")
def manylora_home() -> Path:
    """The state folder. It holds the default base, prepared once for all test runs and for serving."""
    return Path(os.environ.get("MANYLORA_HOME") or ROOT / ".manylora")


@pytest.fixture(scope="session")
def default_prepared(manylora_home: Path) -> PreparedBase:
    """The default base on disk. It is fetched and quantised if it is missing."""
    return prepare_base(DEFAULT_BASE, manylora_home)


@pytest.fixture(scope="session")
def default_base(default_prepared: PreparedBase) -> LoadedBase:
    """The default base (SmolLM2-135M-Instruct in NF4), on the CPU. Tests must not change its modules."""
    return load_base(default_prepared)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """A tiny random base of a family, in NF4. Tests must not change its modules."""
    home = tmp_path_factory.mktemp("tiny-bases")

    @cache
    def load(family: Family) -> LoadedBase:
        folder = make_tiny_model(family, home / family)
        return load_base(prepare_base(str(folder), home / "cache", progress=False))

    return load
