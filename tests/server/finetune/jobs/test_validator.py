"""The check of a posted job ends with its server. If the check itself fails, the job is not refused."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from server.finetune.jobs import command
from server.finetune.jobs import validator as validator_module
from server.finetune.jobs.store import JobRequest
from server.finetune.jobs.validator import JobValidator
from tests.server.finetune.jobs.room import Room

SLEEPS = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")


def test_closing_the_server_ends_a_check(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", SLEEPS)
    validator, found = JobValidator(room.files, room.config), list[list[str]]()
    job = room.jobs.draft(JobRequest("base", room.upload().id))
    thread = threading.Thread(target=lambda: found.append(validator.validate(job)))
    thread.start()
    deadline = time.monotonic() + 20
    while validator._process is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    validator.close()
    thread.join(20)
    assert found == [[]]


def test_a_check_that_takes_too_long_is_ended(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", SLEEPS)
    monkeypatch.setattr(validator_module, "_SECONDS", 0.2)
    validator = JobValidator(room.files, room.config)
    assert validator.validate(room.jobs.draft(JobRequest("base", room.upload().id))) == []
    assert validator._process is not None
    assert validator._process.returncode is not None
