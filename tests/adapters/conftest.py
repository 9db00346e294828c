"""Fixtures of the adapters' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.watched import Room


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """An adapter folder after the watcher's first look."""
    room = Room(tmp_path)
    room.look(1)
    return room
