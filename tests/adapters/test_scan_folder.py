"""A request names a folder, and the watcher reads it before its next look."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from adapters.artifact import WEIGHTS_FILE, AdapterInfo
from adapters.errors import AdapterNameInvalid
from adapters.watcher import signature
from adapters.watcher import watcher as module
from adapters.watcher.signature import signature_of, was_renamed
from tests.adapters.artifact.folders import config, write_folder
from tests.adapters.watched import Room


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)


def put(room: Room, name: str, seed: int = 0) -> Path:
    """Write an adapter in another place and rename it into place."""
    return room.write(f".{name}.new", seed).rename(room.root / name)


def test_a_folder_renamed_into_place_is_served_at_once(room: Room) -> None:
    put(room, "a")
    room.watcher.scan_folder("a")
    assert room.states() == {"a": "ready"}


def test_a_scanned_folder_is_read_once_and_later_replaced_and_removed(room: Room) -> None:
    put(room, "a")
    room.watcher.scan_folder("a")
    room.look()
    assert room.reads == ["a"]
    first = room.digest("a")
    room.write("a", seed=1)
    room.look()
    assert room.digest("a") != first
    shutil.rmtree(room.root / "a")
    room.look(1)
    assert room.states() == {}


def test_a_folder_removed_before_the_watcher_sees_it_is_forgotten(room: Room) -> None:
    shutil.rmtree(put(room, "a"))
    room.watcher.scan_folder("a")
    assert room.states() == {}
    put(room, "a")
    room.watcher.scan_folder("a")
    shutil.rmtree(room.root / "a")
    room.look(1)
    assert room.states() == {}


def test_a_folder_that_comes_while_the_watcher_lists_stays(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_folder = room.watcher._list

    def come_after() -> object:
        listed = list_folder()
        put(room, "a")
        room.watcher.scan_folder("a")
        return listed

    monkeypatch.setattr(room.watcher, "_list", come_after)
    room.look(1)
    assert room.states() == {"a": "ready"}


def test_a_fine_tuned_model_is_looked_for_in_its_folder(room: Room) -> None:
    put(room, "ft_3abase_3aacme_3a1")
    room.watcher.scan_folder("ft:base:acme:1")
    assert room.states() == {"ft:base:acme:1": "ready"}


def test_an_incomplete_folder_is_waiting(room: Room) -> None:
    folder = put(room, "a")
    weights = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).unlink()
    room.watcher.scan_folder("a")
    assert room.reads == []
    assert room.states() == {"a": "waiting"}
    (folder / WEIGHTS_FILE).write_bytes(weights)
    room.look()
    assert room.states() == {"a": "ready"}


def test_an_incomplete_folder_that_is_removed_is_forgotten(room: Room) -> None:
    folder = put(room, "a")
    (folder / WEIGHTS_FILE).unlink()
    room.watcher.scan_folder("a")
    shutil.rmtree(folder)
    room.look(1)
    assert room.states() == {}


def test_files_that_still_grow_are_not_read(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = room.write("a")
    (folder / "late").write_text("")
    looks = []

    def grow(path: str) -> object:
        looks.append(path)
        with (folder / WEIGHTS_FILE).open("ab") as file:
            file.write(b"x")
        return signature_of(path)

    monkeypatch.setattr(module, "signature_of", grow)
    room.watcher.scan_folder("a")
    assert len(looks) == module.MAX_CHECKS
    assert room.reads == []


def test_a_bad_folder_is_listed_at_once_and_read_again_only_when_it_changes(room: Room) -> None:
    write_folder(room.root / ".a", config(trainable_token_indices=[1])).rename(room.root / "a")
    room.watcher.scan_folder("a")
    assert room.states() == {"a": "failed"}
    room.look()
    room.watcher.scan_folder("a")
    assert room.reads == ["a"]
    shutil.rmtree(room.root / "a")
    put(room, "a")
    room.watcher.scan_folder("a")
    assert room.states() == {"a": "ready"}


def test_unloaded_by_hand_it_stays_so_until_its_files_change(room: Room) -> None:
    put(room, "a")
    room.look()
    room.watcher.suppress("a")
    room.registry.unregister("a")
    room.watcher.scan_folder("a")
    assert room.states() == {}
    shutil.rmtree(room.root / "a")
    put(room, "a", seed=1)
    room.watcher.scan_folder("a")
    assert room.states() == {"a": "ready"}
    room.look()
    assert room.states() == {"a": "ready"}


def test_a_name_registered_during_the_scan_keeps_its_folder(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect, reading, loaded = room.registry.inspect, threading.Event(), threading.Event()

    def slowly(folder: Path) -> AdapterInfo:
        if folder.name == "a":
            reading.set()
            assert loaded.wait(10)
        return inspect(folder)

    monkeypatch.setattr(room.registry, "inspect", slowly)
    put(room, "a")
    put(room, "b", seed=1)
    looking = threading.Thread(target=room.watcher.scan_folder, args=("a",))
    looking.start()
    assert reading.wait(10)
    room.registry.register("a", "b", replace=False)
    loaded.set()
    looking.join(10)
    assert room.registry.resolve("a").path == room.root / "b"


@pytest.mark.parametrize("name", ["../a", ".hidden", "a.tmp", "a.partial", "a\n", ""])
def test_invalid_names_are_not_looked_for(room: Room, name: str) -> None:
    with pytest.raises(AdapterNameInvalid):
        room.watcher.scan_folder(name)


def test_a_link_is_refused(room: Room, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write_folder(tmp_path_factory.mktemp("elsewhere") / "a")
    (room.root / "link").symlink_to(elsewhere)
    room.watcher.scan_folder("link")
    assert room.reads == []
    assert room.states().get("link") != "ready"


def test_on_a_case_insensitive_disk_another_spelling_is_not_served(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(room, "a").joinpath("x").touch()
    monkeypatch.setattr(Path, "samefile", lambda one, other: one.name.lower() == other.name.lower())
    room.watcher.scan_folder("A")
    assert room.states() == {}


def test_a_rename_is_distinguished_from_writing(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "SETTLED_AGE", 60.0)
    folder = room.write("a")
    os.utime(folder, ns=(1, 1))  # the modification time is old, as after a rename
    assert was_renamed(str(folder), signature_of(str(folder)))
    room.watcher.scan_folder("a")
    assert room.states() == {"a": "ready"}
    later = signature_of(str(folder))[1]
    assert later is not None
    assert not was_renamed(str(folder), (None, (*later[:3], folder.stat().st_ctime_ns + 1)))
    (folder / "new").touch()
    os.utime(folder, ns=(1, folder.stat().st_ctime_ns + 10**9))
    assert not was_renamed(str(folder), signature_of(str(folder)))
    assert not was_renamed(str(room.root / "none"), (None, None))
