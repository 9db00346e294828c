"""A hostile entry in the adapter directory does not stop other adapters, and the list shows it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, AdapterInfo
from adapters.printable import printable, shown_name
from adapters.watcher import folder as folder_module
from adapters.watcher import readers, signature
from adapters.watcher import watcher as module
from tests.adapters.artifact.folders import config, write_folder
from tests.adapters.watched import Room


def test_broken_and_circular_links_are_listed_and_hide_no_other(room: Room) -> None:
    (room.root / "loop").symlink_to("loop")
    (room.root / "gone").symlink_to("nowhere")
    (room.root / "file").symlink_to(__file__)
    room.write("good")
    room.look()
    assert room.states() == {"good": "ready", "loop": "failed", "gone": "failed"}
    for name in ("loop", "gone"):
        assert "links are not followed" in (room.reason(name) or "")
        (room.root / name).unlink()
        room.write(name)
    room.look()
    assert set(room.states().values()) == {"ready"}


def test_a_link_that_becomes_an_empty_folder_is_waiting(room: Room) -> None:
    (room.root / "a").symlink_to("nowhere")
    room.look()
    (room.root / "a").unlink()
    (room.root / "a").mkdir()
    room.look()
    assert room.states() == {"a": "waiting"}


def test_an_entry_that_cannot_be_judged_is_listed() -> None:
    class Broken:
        name = "broken"

        def is_dir(self) -> bool:
            raise OSError(errno.EIO, "the disk has a scratch")

    assert folder_module.is_candidate(Broken())  # type: ignore[arg-type]


NAMES = {
    b"caf\xe9": "caf\\xe9",
    b"two\nlines": "two\\nlines",
    b"\x1b[31mred": "\\x1b[31mred",
    b"back\\slash": "back\\\\slash",
    "right\u202eleft".encode(): "right\\u202eleft",
    "caf\u00e9".encode(): "café",
    b"\xed\xa0\x80": "\\xed\\xa0\\x80",
    b"a" * 255: "a" * 255,
    b"ft:base:acme:1": "ft:base:acme:1",
    b"-flag": "-flag",
    b"white space": "white space",
}


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_listed_in_characters_that_print(
    room: Room, name: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(room.root / os.fsdecode(name))
    room.write("good")
    room.look()
    assert room.states() == {NAMES[name]: "failed", "good": "ready"}
    assert room.reads == ["good"]
    told = [(entry.name, entry.reason) for entry in room.registry.entries()]
    json.dumps(told, ensure_ascii=False).encode()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert all("\n" not in record.getMessage() for record in caplog.records)
    shutil.rmtree(room.root / os.fsdecode(name))
    room.look(1)
    assert room.states() == {"good": "ready"}


def test_shown_names_are_unique() -> None:
    names = ["\x85", "\udc85", "\\x85", "\n", "\\n", "\\\n", "é", "\udce9", "\ud800", "\\ud800"]
    shown = [shown_name(name) for name in names]
    assert len(set(shown)) == len(names)
    assert all(name.isprintable() and name.encode() for name in shown)
    assert printable("plain\\text") == "plain\\text"


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "loop"])
def test_special_files_are_refused_without_waiting(
    room: Room, file: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "INCOMPLETE_AFTER", 0.0)
    path = room.write("a") / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the full path may be too long for a socket
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    os.mkfifo(room.root / "pipe")
    room.write("good")
    room.look()
    assert room.states() == {"a": "failed", "good": "ready"}
    assert "regular file" in (room.reason("a") or "")


def test_a_folder_that_is_removed_while_it_is_read(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = room.registry.inspect

    def remove_first(folder: Path) -> AdapterInfo:
        shutil.rmtree(folder)
        return inspect(folder)

    monkeypatch.setattr(room.registry, "inspect", remove_first)
    room.write("a")
    room.look(2)
    assert room.states() == {"a": "failed"}
    room.look(1)
    assert room.states() == {}


SLOW = r"(.*\.?)*(.*\.?)*(.*\.?)*!"


def test_slow_patterns_do_not_delay_other_folders(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.artifact.regex.TIMEOUT", 0.3)
    slow = [f"a{number}" for number in range(12)]
    for name in slow:
        write_folder(room.root / name, config(target_modules=SLOW))
    room.write("good")
    room.look(1)
    began = time.monotonic()
    room.watcher.scan_once(budget=module.SCAN_BUDGET)
    assert room.states()["good"] == "ready"
    assert time.monotonic() - began < 12 * 0.25
    assert {room.states()[name] for name in slow} == {"waiting"}
    deadline = time.monotonic() + 60
    while "failed" not in room.states().values() and time.monotonic() < deadline:
        room.look(1)
    reasons = [room.reason(name) or "" for name, state in room.states().items() if state == "failed"]
    assert "to match; simplify them" in reasons[0]
    room.watcher.stop()


class Hanging:
    """Reading the folder ``a`` hangs until ``go`` is set."""

    def __init__(self, room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self._inspect = threading.Event(), threading.Event(), room.registry.inspect
        self._watcher = room.watcher
        monkeypatch.setattr(room.registry, "inspect", self._read)

    def look_until_it_hangs(self) -> None:
        deadline = time.monotonic() + 30
        while not self.begun.is_set() and time.monotonic() < deadline:
            self._watcher.scan_once(budget=0.1)
        assert self.begun.is_set()

    def _read(self, folder: Path) -> AdapterInfo:
        info = self._inspect(folder)
        if folder.name == "a":
            self.begun.set()
            assert self.go.wait(30)
        return info


def test_a_folder_that_hangs_does_not_delay_others(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(room, monkeypatch)
    room.write("a")
    hanging.look_until_it_hangs()
    room.write("good")
    for _ in range(3):
        room.watcher.scan_once(budget=5.0)
    assert room.states() == {"a": "waiting", "good": "ready"}
    shutil.rmtree(room.root / "good")
    room.watcher.scan_once(budget=5.0)
    assert room.states() == {"a": "waiting"}
    hanging.go.set()
    room.watcher._readers.join()
    assert room.states() == {"a": "ready"}


@pytest.mark.parametrize("meanwhile", ["removed", "replaced"])
def test_changes_to_a_folder_while_it_is_read_are_seen_later(
    room: Room, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    hanging = Hanging(room, monkeypatch)
    room.write("a")
    hanging.look_until_it_hangs()
    shutil.rmtree(room.root / "a")
    room.watcher.scan_once(budget=0.01)
    if meanwhile == "replaced":
        room.write("a", seed=1)
        room.watcher.scan_once(budget=0.01)
    hanging.go.set()
    room.watcher._readers.join()
    room.look()
    if meanwhile == "removed":
        assert room.states() == {}
    else:
        newest = room.registry.inspect(room.root / "a").digest
        assert room.digest("a") == newest


def test_at_most_max_late_readers_may_hang(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LATE", 1)
    hanging = Hanging(room, monkeypatch)
    room.write("a")
    hanging.look_until_it_hangs()
    room.write("good")
    for _ in range(3):
        room.watcher.scan_once(budget=5.0)
    assert room.reads == ["a"]
    hanging.go.set()
    room.watcher._readers.join()
    room.look(1)
    assert room.states() == {"a": "ready", "good": "ready"}


def test_a_folder_that_cannot_be_opened_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("adapters.watcher.signature.os.scandir", refuse)
    why = signature.why_not_finished(tmp_path, (None, None))
    assert why == "The folder cannot be opened (Permission denied)."


def test_the_watcher_pauses_longer_after_a_slow_listing(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("adapters.watcher.watcher.time.monotonic", lambda: float(next(clock)))
    room.look(1)
    assert room.watcher._pause == 10 * module.SLEEP_FACTOR
