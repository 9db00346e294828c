"""Names and versions, without torch and without files. The contents of folders are invented."""

from __future__ import annotations

import logging
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterNotReady,
)
from adapters.registry import Registry, Version

ROOT = Path("/nowhere/adapters")


class World:
    """A registry of folders. The content of a folder is a word or an error."""

    def __init__(self) -> None:
        self.contents: dict[str, str | Exception] = {}
        self.idle: list[Version] = []
        self.retired: list[str] = []
        self.registry = Registry(ROOT, self._inspect, reserved=frozenset({"base"}))
        self.registry.on_idle.append(self.idle.append)
        self.registry.on_retired.append(lambda version: self.retired.append(version.digest))

    def _inspect(self, folder: Path) -> Any:
        content = self.contents[folder.name]
        if isinstance(content, Exception):
            raise content
        return SimpleNamespace(digest=content, rank=8, warnings=("Mind the gap.",))

    def register(
        self, name: str, content: str | Exception, folder: str = "", replace: bool = True
    ) -> Version:
        self.contents[folder or name] = content
        return self.registry.register(name, folder or name, replace)

    def states(self) -> list[tuple[str, str, int]]:
        return [(entry.name, entry.state, entry.in_flight) for entry in self.registry.entries()]


@pytest.fixture
def world() -> World:
    return World()


def test_a_name_points_at_its_newest_version(world: World) -> None:
    first = world.register("a", "one")
    assert world.registry.resolve("a") is first
    assert (first.name, first.digest, first.path) == ("a", "one", ROOT / "a")
    second = world.register("a", "two")
    assert world.registry.resolve("a") is second
    assert world.idle == [first]
    assert world.retired == ["one"]


def test_the_same_content_again_changes_nothing(world: World) -> None:
    first = world.register("a", "one")
    assert world.register("a", "one", replace=False) is first
    assert not world.idle


def test_the_same_content_elsewhere_moves_the_path_but_retires_nothing(world: World) -> None:
    world.register("a", "one")
    moved = world.register("a", "one", folder="b", replace=False)
    assert world.registry.resolve("a") is moved
    assert moved.path == ROOT / "b"
    assert not world.retired


def test_another_content_needs_replace(world: World) -> None:
    first = world.register("a", "one")
    with pytest.raises(AdapterExists, match="'a' is already served; unload it first, or ask to replace it"):
        world.register("a", "two", replace=False)
    assert world.registry.resolve("a") is first


def test_names_and_paths_are_checked_before_anything_is_read(world: World) -> None:
    with pytest.raises(AdapterExists, match="'base' is the base's own name"):
        world.registry.register("base", "a", True)
    for name, path in (("../a", "a"), ("a", "../a"), ("a", "/etc")):
        with pytest.raises(AdapterNameInvalid):
            world.registry.register(name, path, True)


def test_running_requests_end_on_their_version(world: World) -> None:
    first = world.register("a", "one")
    for _ in range(2):
        assert world.registry.checkout("a") is first
    second = world.register("a", "two")
    world.registry.acquire(second)
    assert world.states() == [("a", "ready", 1), ("a", "draining", 2)]
    world.registry.release(first)
    assert not world.idle
    world.registry.release(first)
    assert world.idle == [first]
    assert world.retired == ["one"]
    world.registry.release(second)
    assert world.states() == [("a", "ready", 0)]
    assert world.idle == [first]


def test_unregistering_drains(world: World) -> None:
    version = world.register("a", "one")
    world.registry.acquire(version)
    world.registry.unregister("a")
    assert world.states() == [("a", "draining", 1)]
    with pytest.raises(AdapterNotFound):
        world.registry.checkout("a")
    world.registry.release(version)
    assert world.states() == []
    assert world.retired == ["one"]


def test_a_shared_digest_retires_with_its_last_user(world: World) -> None:
    world.register("a", "same")
    b = world.register("b", "same")
    world.registry.unregister("a")
    assert world.retired == []
    world.registry.acquire(b)
    world.registry.unregister("b")
    assert world.retired == []
    world.registry.release(b)
    assert world.retired == ["same"]


def test_a_version_replaced_between_resolve_and_acquire_is_retired_again(world: World) -> None:
    version = world.registry.resolve(world.register("a", "one").name)
    world.register("a", "two")
    world.registry.acquire(version)
    assert world.states() == [("a", "ready", 0), ("a", "draining", 1)]
    world.registry.release(version)
    assert world.idle == [version, version]
    assert world.retired == ["one", "one"]


def test_releasing_more_than_was_acquired_raises(world: World) -> None:
    version = world.register("a", "one")
    with pytest.raises(ValueError, match="No request is running on adapter 'a'"):
        world.registry.release(version)
    world.registry.unregister("a")
    with pytest.raises(ValueError, match="No request is running"):
        world.registry.release(version)


def test_errors_of_unknown_names_suggest_similar_names(world: World) -> None:
    world.register("support-bot", "one")
    with pytest.raises(
        AdapterNotFound, match=r"There is no adapter 'suport-bot'; did you mean 'support-bot'\?"
    ):
        world.registry.resolve("suport-bot")
    with pytest.raises(AdapterNotFound, match=r"There is no adapter 'zzz'\."):
        world.registry.unregister("zzz")
    with pytest.raises(AdapterNotFound) as caught:
        world.registry.resolve("x" * 1_000_000)
    assert len(str(caught.value)) < 200


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[tuple[str, object]]:
    """The message and the fields of each record of at least ``level``."""
    return [(record.message, vars(record)["fields"]) for record in caplog.records if record.levelno >= level]


def test_a_failed_name_has_a_reason_until_it_works(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        world.registry.fail("a", ROOT / "a", "It is broken.")
    assert logged(caplog) == [("adapter not served", {"name": "a", "reason": "It is broken."})]
    assert world.states() == [("a", "failed", 0)]
    for ask in (world.registry.resolve, world.registry.checkout):
        with pytest.raises(AdapterInvalid, match="Adapter 'a' cannot be served: It is broken"):
            ask("a")
    world.register("a", "one")
    assert [(entry.state, entry.reason) for entry in world.registry.entries()] == [("ready", None)]


def test_a_failed_name_can_be_unregistered(world: World) -> None:
    world.registry.fail("a", ROOT / "a", "It is broken.")
    world.registry.unregister("a")
    assert world.states() == []


def test_a_bad_replacement_leaves_the_old_one_serving(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first = world.register("a", "one")
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match="NaN"):
            world.register("a", AdapterInvalid("It has NaN."))
    (entry,) = world.registry.entries()
    assert (entry.state, entry.reason, entry.version) == ("ready", "It has NaN.", first)
    assert world.registry.checkout("a") is first
    version = {"name": "a", "digest": "one", "version": round(first.created, 3), "tier": "disk"}
    assert logged(caplog, logging.WARNING)[1:] == [
        ("adapter not replaced", version | {"reason": "It has NaN."})
    ]


def test_a_bad_new_adapter_is_not_listed(world: World) -> None:
    with pytest.raises(AdapterInvalid):
        world.register("a", AdapterInvalid("It has NaN."))
    assert world.states() == []


def test_warnings_are_logged_with_the_name(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "manylora.adapters")
    created = world.register("a", "one").created
    version = {"name": "a", "digest": "one", "version": round(created, 3), "tier": "disk"}
    assert logged(caplog) == [
        ("adapter served", version | {"rank": 8}),
        ("adapter warning", version | {"reason": "Mind the gap."}),
    ]
    caplog.clear()
    world.registry.unregister("a")
    assert logged(caplog) == [("adapter unregistered", version)]


def test_last_use_is_recorded(world: World) -> None:
    version = world.register("a", "one")
    assert world.registry.entries()[0].last_used is None
    world.registry.acquire(version)
    last_used = world.registry.entries()[0].last_used
    assert last_used is not None
    assert last_used >= version.created


def test_names_by_path_has_aliases_and_failures(world: World) -> None:
    world.register("a", "one")
    world.register("alias", "one", folder="a")
    world.registry.fail("bad", ROOT / "bad", "It is broken.")
    assert world.registry.names_by_path() == {ROOT / "a": {"a", "alias"}, ROOT / "bad": {"bad"}}


def test_concurrent_use_leaves_nothing_behind(world: World) -> None:
    names = ["a", "b", "c"]
    for index in range(6):
        world.contents[f"f{index}"] = f"content {index % 4}"
    errors: list[BaseException] = []

    def hammer(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(400):
                _step(world.registry, dice, names)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for name in names:
        world.registry.register(name, "f0", replace=True)
        world.registry.unregister(name)
    assert world.states() == []
    assert set(world.retired) == {f"content {index}" for index in range(4)}


def _step(registry: Registry, dice: random.Random, names: list[str]) -> None:
    name, action = dice.choice(names), dice.random()
    try:
        if action < 0.2:
            registry.register(name, f"f{dice.randrange(6)}", replace=True)
        elif action < 0.3:
            registry.unregister(name)
        else:
            version = registry.checkout(name)
            registry.acquire(version)
            assert version in [entry.version for entry in registry.entries()]
            registry.release(version)
            registry.release(version)
    except AdapterError as error:
        assert isinstance(error, AdapterNotFound)  # noqa: PT017  another thread unregistered it


def test_a_waiting_folder_is_listed_until_it_is_read(world: World) -> None:
    world.registry.wait("a", ROOT / "a", "It is not finished.")
    assert world.states() == [("a", "waiting", 0)]
    with pytest.raises(AdapterNotReady, match="'a' is not served yet: It is not finished"):
        world.registry.resolve("a")
    assert world.registry.names_by_path() == {ROOT / "a": {"a"}}
    world.register("a", "one")
    world.registry.wait("a", ROOT / "a", "It is not finished.")
    assert [(entry.state, entry.reason) for entry in world.registry.entries()] == [("ready", None)]
    world.registry.wait("b", ROOT / "b", "It is not finished.")
    world.registry.unregister("b")
    assert world.states() == [("a", "ready", 0)]


def test_the_entry_of_a_name_is_the_version_for_new_requests(world: World) -> None:
    assert world.registry.entry("a") is None
    world.registry.wait("a", ROOT / "a", "It is not finished.")
    assert getattr(world.registry.entry("a"), "state", None) == "waiting"
    old = world.register("a", "one")
    world.registry.acquire(old)
    new = world.register("a", "two")
    assert getattr(world.registry.entry("a"), "version", None) is new
    world.registry.unregister("a")
    assert getattr(world.registry.entry("a"), "version", None) is old
    assert world.registry.names() == []
    world.registry.release(old)
    assert world.registry.entry("a") is None
