from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.errors import AdapterError, AdapterInvalid, AdapterTooLarge
from adapters.rank_pool import RankPool
from adapters.registry import Version
from adapters.residency import PATIENCE, Residency
from adapters.sites import Site

SITES = {"q": Site("q", 4, 4), "v": Site("v", 4, 4)}
NBYTES = 1000


def _version(name: str, rank: int = 4, extra_bytes: int = 0) -> Version:
    info = AdapterInfo(f"digest-{name}", {"q": rank}, NBYTES, None, (), extra_bytes)
    return Version(name, info.digest, Path(name), info, 0.0)


class World:
    """A residency over a pool of ``rows``, a disk that counts, and a clock that is turned by hand."""

    def __init__(self, rows: int = 8, host_adapters: int = 3) -> None:
        self.now = 0.0
        self.reads: list[str] = []
        self.broken: dict[str, AdapterError] = {}
        self.weights: list[weakref.ref[torch.Tensor]] = []
        self.gate = threading.Event()
        self.gate.set()
        pool = RankPool(SITES, rows, torch.float32, extra_bytes=100)
        self.residency = Residency(pool, self._load, host_adapters * NBYTES, clock=lambda: self.now)

    def _load(self, version: Version) -> Adapter:
        assert self.gate.wait(10)
        self.reads.append(version.name)
        if version.name in self.broken:
            raise self.broken[version.name]
        weights = {s: LoraWeights(torch.ones(r, 4), torch.ones(r, 4)) for s, r in version.info.ranks.items()}
        adapter = Adapter(version.info, weights)
        self.weights += [weakref.ref(pair.a) for pair in weights.values()]
        return adapter

    def settled(self) -> None:
        """Wait until the loader has nothing to do."""
        deadline = time.monotonic() + 10
        while self.residency._loading:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def pin(self, version: Version) -> int:
        """Pin, waiting for the load."""
        for _ in range(3):
            slot = self.residency.pin(version)
            if slot is not None:
                return slot
            self.settled()
        raise AssertionError(f"{version.name} does not become resident")

    def touch(self, version: Version) -> None:
        self.pin(version)
        self.residency.unpin(version.digest)


def test_a_cold_adapter_is_loaded_aside_and_then_pinned() -> None:
    world = World()
    version = _version("a")
    world.gate.clear()
    assert world.residency.pin(version) is None
    assert world.residency.tier(version.digest) == "disk"
    world.gate.set()
    world.settled()
    assert world.residency.pin(version) == 0
    assert world.residency.tier(version.digest) == "device"
    assert world.residency.pins == 1


def test_the_least_recently_used_goes_and_comes_back_from_the_host() -> None:
    world = World(rows=8)
    a, b, c = (_version(name) for name in "abc")
    for version in (a, b, a, c):
        world.touch(version)
        world.now += PATIENCE
    assert [world.residency.tier(v.digest) for v in (a, b, c)] == ["device", "host", "device"]
    world.touch(b)
    assert world.reads == ["a", "b", "c"], "what is in the host tier is not read again"
    assert world.residency.stats.evictions == 2


def test_the_host_tier_is_bounded() -> None:
    world = World(rows=4, host_adapters=2)
    for name in "abcd":
        world.touch(_version(name))
        world.now += PATIENCE
    assert world.residency.host.nbytes == 2 * NBYTES
    world.touch(_version("a"))
    assert world.reads == ["a", "b", "c", "d", "a"]


def test_bytes_of_extras_are_room_like_rows() -> None:
    world = World(rows=40)
    small, large, plain = _version("small", 1, 40), _version("large", 1, 70), _version("plain", 1)
    world.pin(small)
    assert world.residency.pin(large) is None
    world.settled()
    assert world.residency.pin(small) is None, "closed, so that it drains"
    assert world.pin(plain) is not None, "which has no extras, and is in nobody's way"
    world.residency.unpin(small.digest)
    world.pin(large)
    world.residency.check_integrity()
    assert [world.residency.tier(v.digest) for v in (small, large, plain)] == ["host", "device", "device"]


def test_extras_that_can_never_fit_are_refused_with_the_remedy() -> None:
    world = World()
    version = _version("a", 1, 101)
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterTooLarge, match=r"101 bytes besides its rank rows.*--lora-extra-memory"):
        world.residency.pin(version)


def test_a_pinned_adapter_stays_whatever_comes() -> None:
    world = World(rows=8)
    a = _version("a")
    slot = world.pin(a)
    for name in "bcdef":
        world.touch(_version(name))
        world.now += PATIENCE
    assert world.residency.pin(a) == slot


def test_a_newly_loaded_one_is_kept_for_its_asker() -> None:
    world = World(rows=4)
    a, b = _version("a"), _version("b")
    world.residency.pin(a)
    world.settled()
    world.residency.pin(b)
    world.settled()
    assert world.residency.pin(a) is not None, "b must not take a's rows before a was used once"


def test_a_claim_closes_the_door_for_the_least_pinned_until_it_is_served() -> None:
    world = World(rows=8)
    popular, quiet, cold = _version("popular"), _version("quiet"), _version("cold")
    world.pin(popular)
    world.pin(popular)
    world.pin(quiet)
    assert world.residency.pin(cold) is None
    world.settled()
    assert world.residency.pin(cold) is None
    assert world.residency.pin(popular) is not None, "two pins: not the one to close"
    assert world.residency.pin(quiet) is None, "closed, so that it drains"
    world.residency.unpin(quiet.digest)
    assert world.pin(cold) is not None
    assert world.residency.tier(quiet.digest) == "host"


def test_a_claim_that_nobody_asks_for_any_more_opens_the_door_again() -> None:
    world = World(rows=4)
    a, cold = _version("a"), _version("cold")
    world.pin(a)
    world.residency.pin(cold)
    world.settled()
    assert world.residency.pin(a) is None
    world.now += PATIENCE + 0.1
    assert world.residency.pin(a) is not None


def test_why_it_failed_is_told_once_and_then_tried_afresh() -> None:
    world = World()
    version = _version("a")
    world.broken["a"] = AdapterInvalid("it is broken")
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterInvalid, match="broken"):
        world.residency.pin(version)
    del world.broken["a"]
    world.touch(version)
    assert world.residency.tier(version.digest) == "device"


def test_a_rank_that_can_never_fit_is_refused_with_the_remedy() -> None:
    world = World(rows=8)
    version = _version("a", rank=9)
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterTooLarge, match="--lora-pool-rows"):
        world.residency.pin(version)


def test_forgetting_frees_device_and_host_with_the_last_pin() -> None:
    world = World()
    version = _version("a")
    world.pin(version)
    world.residency.forget(version.digest)
    assert world.residency.host.nbytes == 0
    assert world.residency.pool.rows_used == 4, "a request still runs on it"
    world.residency.unpin(version.digest)
    assert world.residency.pool.rows_used == 0
    gc.collect()
    assert [reference() for reference in world.weights] == [None], "its weights are still in memory"


def test_forgetting_while_it_loads_leaves_nothing() -> None:
    world = World()
    version = _version("a")
    world.gate.clear()
    world.residency.pin(version)
    world.residency.forget(version.digest)
    world.gate.set()
    world.settled()
    assert world.residency.pool.rows_used == 0
    assert world.residency.host.nbytes == 0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.booleans()), max_size=30))
def test_whatever_is_asked_everything_is_served_and_nothing_leaks(
    history: list[tuple[int, int, bool]],
) -> None:
    world = World(rows=8)
    pinned: list[str] = []
    for number, rank, keep in history:
        version = _version(f"{number}-{rank}", rank, extra_bytes=20 * (number % 3))
        if world.residency.pin(version) is not None:
            pinned.append(version.digest)
        world.settled()
        if pinned and not keep:
            world.residency.unpin(pinned.pop(0))
        world.now += 0.5
        world.residency.check_integrity()
    for digest in pinned:
        world.residency.unpin(digest)
    world.now += 2 * PATIENCE
    world.touch(_version("last", 8))
    world.residency.check_integrity()
    assert world.residency.pins == 0


def test_many_threads_asking_at_once() -> None:
    world = World(rows=8)

    def ask(seed: int) -> None:
        for i in range(60):
            version = _version(f"v{(seed * 7 + i) % 5}")
            if world.residency.pin(version) is not None:
                world.residency.unpin(version.digest)

    _together([partial(ask, seed) for seed in range(4)])
    world.settled()
    world.residency.check_integrity()
    assert world.residency.pins == 0


def _together(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
