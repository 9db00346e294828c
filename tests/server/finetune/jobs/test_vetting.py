"""The check of a posted job ends with its server, and one that cannot be made refuses nothing."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from server.finetune.jobs import command, vetting
from server.finetune.jobs.store import Wanted
from server.finetune.jobs.vetting import Vetting
from tests.server.finetune.jobs.conftest import Room

SLEEPS = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")


def test_closing_ends_a_check(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", SLEEPS)
    vetter, found = Vetting(room.files, room.config), list[list[str]]()
    job = room.jobs.draft(Wanted("base", room.upload().id))
    thread = threading.Thread(target=lambda: found.append(vetter.vet(job)))
    thread.start()
    deadline = time.monotonic() + 20
    while vetter._process is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    vetter.close()
    thread.join(20)
    assert found == [[]]


def test_a_check_that_takes_too_long_is_ended(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", SLEEPS)
    monkeypatch.setattr(vetting, "_SECONDS", 0.2)
    vetter = Vetting(room.files, room.config)
    assert vetter.vet(room.jobs.draft(Wanted("base", room.upload().id))) == []
    assert vetter._process is not None
    assert vetter._process.returncode is not None
