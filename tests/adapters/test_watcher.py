"""The watcher with real folders. The tests call each look, so nothing depends on time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, inspect_adapter
from adapters.errors import AdapterInvalid, AdapterNameInvalid, AdapterNotFound
from adapters.watcher import folder as folder_module
from adapters.watcher import signature
from adapters.watcher import watcher as module
from tests.adapters.artifact.folders import LAYOUT, LIMITS, config, write_folder
from tests.adapters.watched import Room


def test_new_replaced_and_removed_folders(room: Room) -> None:
    room.write("a")
    room.look()
    first = room.digest("a")
    room.write("a", seed=1)
    room.look()
    assert room.digest("a") != first
    shutil.rmtree(room.root / "a")
    room.look(1)
    assert room.states() == {}
    room.write("a")
    room.look()
    assert room.digest("a") == first


def test_a_fine_tuned_model_goes_by_its_name_and_not_by_its_folder(room: Room) -> None:
    folder = room.write("ft_3abase_3aacme_3a1")
    room.look()
    assert room.states() == {"ft:base:acme:1": "ready"}
    with pytest.raises(AdapterNameInvalid, match="'ft:base:acme:1'"):
        room.registry.register(folder.name, folder, replace=True)
    room.watcher.suppress("ft:base:acme:1")
    room.registry.unregister("ft:base:acme:1")
    room.look()
    assert room.states() == {}


def test_a_folder_is_read_only_after_it_stopped_changing(room: Room) -> None:
    folder = room.write("a")
    for size in (10, 20, 30):
        (folder / WEIGHTS_FILE).write_bytes(b"x" * size)
        room.look(1)
    room.write("a")
    room.look(1)
    assert room.reads == []
    room.look(1)
    assert room.reads == ["a"]
    assert room.states() == {"a": "ready"}


def test_folders_renamed_into_place_replace_at_once(room: Room) -> None:
    names = [f"a{index}" for index in range(12)]
    for name in names:
        room.write(name)
    room.look()
    first = {room.digest(name) for name in names}
    for name in names:
        new = room.write(f".new-{name}", seed=1)
        (room.root / name).rename(room.root / f".old-{name}")
        new.rename(room.root / name)
    room.look(2)
    assert first.isdisjoint(room.digest(name) for name in names)


def test_later_looks_wait_even_for_old_folders(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "SETTLED_AGE", 0.0)
    room.write("a")
    room.look(1)
    assert room.reads == []


def test_stopping_begins_no_further_folder(room: Room) -> None:
    room.write("a")
    room.watcher.stop()
    room.look()
    assert room.reads == []


def test_an_idle_folder_is_read_once(room: Room) -> None:
    room.write("a")
    room.look(10)
    assert room.reads == ["a"]


def test_an_edited_config_replaces(room: Room) -> None:
    room.write("a")
    room.look()
    first = room.digest("a")
    write_folder(room.root / "a", config(lora_alpha=2))
    room.look()
    assert room.digest("a") != first


def test_unfinished_hidden_and_stray_things_are_skipped(room: Room) -> None:
    for name in (".hidden", "a.tmp", "a.partial"):
        room.write(name)
    (room.root / "notes.txt").write_text("x")
    room.look()
    assert room.reads == []
    assert room.states() == {}


def test_a_bad_folder_fails_alone_and_is_logged_once(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    room.write("good")
    write_folder(room.root / "bad", config(trainable_token_indices=[1]))
    room.look(6)
    assert room.states() == {"bad": "failed", "good": "ready"}
    (record,) = [each for each in caplog.records if each.levelname != "INFO"]
    fields = vars(record)["fields"]
    assert (record.message, fields["name"]) == ("adapter not served", "bad")
    assert fields["reason"].startswith("trainable_token_indices")
    with pytest.raises(AdapterInvalid, match="trainable_token_indices is set"):
        room.registry.resolve("bad")
    write_folder(room.root / "bad")
    room.look()
    assert room.states() == {"bad": "ready", "good": "ready"}


def test_a_bad_replacement_leaves_the_old_one_serving(room: Room, caplog: pytest.LogCaptureFixture) -> None:
    room.write("a")
    room.look()
    first = room.digest("a")
    write_folder(room.root / "a", config(trainable_token_indices=[1]))
    room.look(6)
    assert room.digest("a") == first
    assert "trainable_token_indices" in (room.reason("a") or "")
    assert sum("not replaced" in record.message for record in caplog.records) == 1


def test_a_failed_folder_that_is_removed_is_forgotten(room: Room) -> None:
    write_folder(room.root / "bad", config(trainable_token_indices=[1]))
    room.look()
    shutil.rmtree(room.root / "bad")
    room.look(1)
    assert room.states() == {}


@pytest.mark.parametrize("name", ["white space", "base", "ümlaut"])
def test_names_that_cannot_be_served_are_listed(name: str, room: Room) -> None:
    room.write(name)
    room.look(6)
    assert room.states() == {name: "failed"}
    assert room.reads == []
    shutil.rmtree(room.root / name)
    room.look(1)
    assert room.states() == {}


def test_a_linked_folder_is_listed_with_the_reason(
    room: Room, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = write_folder(tmp_path_factory.mktemp("elsewhere") / "a")
    (room.root / "link").symlink_to(elsewhere)
    room.look()
    assert "links are not followed" in (room.reason("link") or "")


def test_an_incomplete_folder_is_waited_for_then_listed(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = room.write("a")
    (folder / WEIGHTS_FILE).rename(room.root / ".weights")
    room.look()
    assert room.states() == {"a": "waiting"}
    assert room.reason("a") == f"{WEIGHTS_FILE} is not there yet."
    monkeypatch.setattr(folder_module, "INCOMPLETE_AFTER", 0.0)
    room.look()
    assert (
        room.reason("a") == f"{WEIGHTS_FILE} is missing; a PEFT folder has {CONFIG_FILE} and {WEIGHTS_FILE}."
    )
    (room.root / ".weights").rename(folder / WEIGHTS_FILE)
    room.look()
    assert room.states() == {"a": "ready"}


def test_a_folder_that_is_clearly_not_an_adapter_is_not_waited_for(room: Room) -> None:
    room.write("a/checkpoint-628")
    room.look(1)
    assert room.states() == {"a": "waiting"}
    room.look(1)
    assert room.states() == {"a": "failed"}
    assert "one folder deeper, in 'checkpoint-628'" in (room.reason("a") or "")
    room.write("a")
    room.look()
    assert room.states() == {"a": "ready"}


def test_an_unloaded_adapter_stays_unloaded_until_its_files_change(room: Room) -> None:
    room.write("a")
    room.look()
    room.watcher.suppress("a")
    room.registry.unregister("a")
    room.look()
    assert room.states() == {}
    room.write("a", seed=1)
    room.look()
    assert room.states() == {"a": "ready"}


def test_an_adapter_unloaded_before_the_watcher_saw_it(room: Room) -> None:
    room.write("a")
    room.registry.register("a", "a", replace=False)
    room.watcher.suppress("a")
    room.registry.unregister("a")
    room.look()
    assert room.states() == {}


def test_an_adapter_unloaded_while_it_is_read(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    register = room.registry.register

    def unload_meanwhile(name: str, path: Path, replace: bool) -> object:
        room.watcher.suppress(name)
        return register(name, path, replace)

    monkeypatch.setattr(room.registry, "register", unload_meanwhile)
    room.write("a")
    room.look()
    assert room.reads == ["a"]
    assert room.states() == {}


def test_an_alias_follows_its_folder(room: Room) -> None:
    room.write("a")
    room.registry.register("alias", "a", replace=False)
    room.look()
    assert room.states() == {"a": "ready", "alias": "ready"}
    first = room.digest("alias")
    room.write("a", seed=1)
    room.look()
    assert room.digest("alias") == room.digest("a") != first
    shutil.rmtree(room.root / "a")
    room.look(1)
    assert room.states() == {}


def test_a_name_registered_for_another_folder_is_left_alone(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.write("b")
    room.registry.register("a", "b", replace=False)
    room.write("a", seed=1)
    room.look()
    assert room.registry.resolve("a").path == room.root / "b"
    (record,) = caplog.records
    assert record.message == "adapter folder not served"
    assert vars(record)["fields"] == {"name": "a", "reason": f"The name is served from {room.root / 'b'}."}


def test_an_unexpected_error_stays_in_its_folder(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(folder: Path) -> object:
        if folder.name == "bad":
            raise RuntimeError("boom")
        return inspect_adapter(folder, LAYOUT, LIMITS)

    monkeypatch.setattr(room.registry, "inspect", explode)
    room.write("bad")
    room.write("good")
    room.look(6)
    assert room.states() == {"bad": "failed", "good": "ready"}
    assert room.reason("bad") == "Reading it failed: RuntimeError: boom."
    assert [vars(r)["fields"]["name"] for r in caplog.records if r.message == "adapter not read"] == ["bad"]


def test_a_root_that_cannot_be_listed_removes_no_adapter(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.write("a")
    room.look()
    room.root.rename(room.root.with_name("away"))
    room.look()
    assert room.states() == {"a": "ready"}
    assert sum("cannot be listed" in record.message for record in caplog.records) == 1
    room.root.with_name("away").rename(room.root)
    room.look()
    assert room.states() == {"a": "ready"}


def test_the_first_look_reads_folders_that_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(tmp_path)
    room.write("fresh")
    room.look(1)
    assert room.states() == {"fresh": "waiting"}
    monkeypatch.setattr(signature, "SETTLED_AGE", 0.0)
    room = Room(tmp_path)
    room.watcher.scan_once(progress=True)
    assert room.states() == {"fresh": "ready"}


def test_a_spent_budget_leaves_the_rest_to_the_next_look(room: Room) -> None:
    room.write("a")
    room.look(1)
    room.watcher.scan_once(budget=0.0)
    assert room.states() == {"a": "waiting"}
    room.look(1)
    assert room.states() == {"a": "ready"}


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_thread_continues_after_errors(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    scandir, failures = os.scandir, iter([RuntimeError("boom")])

    def flaky(path: Path) -> object:
        for error in failures:
            raise error
        return scandir(path)

    monkeypatch.setattr("adapters.watcher.folder.os.scandir", flaky)
    room.watcher.start()
    room.write("a")
    _wait_for(lambda: room.states() == {"a": "ready"})
    shutil.rmtree(room.root / "a")
    _wait_for(lambda: room.states() == {})
    room.watcher.stop()
    room.write("b")
    with pytest.raises(AdapterNotFound):
        room.registry.resolve("b")
