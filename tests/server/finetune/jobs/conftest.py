"""Fixtures of the jobs' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.finetune.jobs import command, runner
from tests.server.finetune.jobs.room import Room
from tests.support import fake_train


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", fake_train.COMMAND)
    monkeypatch.setattr(runner, "BUSY_INTERVAL", 0.02)
    monkeypatch.setattr(runner, "IDLE_INTERVAL", 0.02)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    while room.runners:
        room.end_runner()
    room.database.close()
