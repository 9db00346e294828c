"""One server for the session, started as a new user starts it, on the base that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from adapters.base import PreparedBase
from tests.support.running_server import RunningServer, make_serve, running


@pytest.fixture(scope="session")
def state(
    tmp_path_factory: pytest.TempPathFactory, manylora_home: Path, default_prepared: PreparedBase
) -> Path:
    """A new state folder with a space in its name. The prepared base is linked into it."""
    assert default_prepared.path.is_relative_to(manylora_home.resolve() / "bases")
    home = tmp_path_factory.mktemp("state folder")
    (home / "bases").symlink_to(manylora_home.resolve() / "bases")
    return home


@pytest.fixture(scope="session")
def server(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that ``make serve`` starts, with the sample adapters."""
    log = tmp_path_factory.mktemp("logs") / "serve.log"
    with running(make_serve(), state, log) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
