from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.errors import AdapterError, AdapterInvalid, AdapterOutOfMemory, AdapterTooLarge
from adapters.host_tier import HostTier
from adapters.packed import packed
from adapters.rank_pool import RankPool
from adapters.registry import Version
from adapters.residency import PATIENCE, Residency
from adapters.sites import Site
from adapters.slab import Slab

SITES = {"q": Site("q", 4, 4), "v": Site("v", 4, 4)}
NBYTES = 1000


def _version(name: str, rank: int = 4, extra_bytes: int = 0) -> Version:
    info = AdapterInfo(f"digest-{name}", {"q": rank}, NBYTES, None, (), extra_bytes)
    return Version(name, info.digest, Path(name), info, 0.0)


def value_of(version: Version) -> float:
    """What all of an adapter's weights are."""
    return float(sum(map(ord, version.name)))


class Pool(RankPool):
    """Keeps adapters packed, as for a GPU, and writes them when the stream that they go to is waited for."""

    def __init__(self, rows: int) -> None:
        super().__init__(SITES, rows, torch.float32, extra_bytes=100)
        self.events: list[str] = []
        self.fault: BaseException | None = None
        self._queued: list[tuple[int, Adapter]] | None = None

    def host_form(self, adapter: Adapter, memory: torch.Tensor | None) -> Adapter:
        return packed(adapter, memory)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._queued = []
        yield
        for slot, adapter in self._queued:
            assert self.rows_used > 0, "its rows are reserved"
            super().write(slot, adapter)
            self.events.append(f"{adapter.info.digest} is written")
        self._queued = None

    def write(self, slot: int, adapter: Adapter) -> None:
        if self.fault is not None:
            raise self.fault
        assert self._queued is not None, "written on the stream that steps run on"
        self._queued.append((slot, adapter))


class World:
    """A residency over a pool of ``rows``, a disk that counts, and a clock that is turned by hand.

    ``like_gpu``: the host tier has a slab, and copies go to a stream.
    """

    def __init__(self, rows: int = 8, host_adapters: int = 3, like_gpu: bool = False) -> None:
        self.now = 0.0
        self.reads: list[str] = []
        self.broken: dict[str, AdapterError] = {}
        self.weights: list[weakref.ref[torch.Tensor]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pool = Pool(rows) if like_gpu else RankPool(SITES, rows, torch.float32, extra_bytes=100)
        copying = self.pool.stream if isinstance(self.pool, Pool) else None
        host_bytes = host_adapters * NBYTES
        self.residency = Residency(self.pool, self._load, host_bytes, lambda: None, lambda: self.now, copying)
        if like_gpu:
            self.slab = Slab(torch.empty(host_bytes // 4, dtype=torch.uint8))
            self.residency.host = HostTier(host_bytes, self.slab)

    def _load(self, version: Version) -> Adapter:
        assert self.gate.wait(10)
        self.reads.append(version.name)
        if version.name in self.broken:
            raise self.broken[version.name]
        ranks, value = version.info.ranks, value_of(version)
        weights = {
            s: LoraWeights(torch.full((r, 4), value), torch.full((r, 4), value)) for s, r in ranks.items()
        }
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


def test_an_adapter_is_resident_only_when_the_stream_of_its_copies_was_waited_for() -> None:
    world = World(like_gpu=True)
    assert isinstance(world.pool, Pool)
    events = world.pool.events
    world.residency.on_change = lambda: events.append(world.residency.tier("digest-a"))
    world.touch(_version("a"))
    assert events == ["digest-a is written", "device"]


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_fails_who_asked_and_nobody_else(fault: BaseException) -> None:
    world = World(like_gpu=True)
    assert isinstance(world.pool, Pool)
    a, b = _version("a"), _version("b")
    world.pin(a)
    world.pool.fault = fault
    world.residency.pin(b)
    world.settled()
    with pytest.raises(AdapterOutOfMemory, match=r"'b'.*--gpu-memory-utilization"):
        world.residency.pin(b)
    assert world.pool.rows_used == 4, "b's rows are free again"
    world.residency.check_integrity()
    world.pool.fault = None
    assert world.residency.pin(a) is not None
    world.pin(b)
    assert world.reads == ["a", "b"], "it was kept on the host"


def test_a_host_tier_in_pieces_makes_room_for_one_that_is_larger() -> None:
    """Of six units of the slab a, b and c take two each; b goes, and d needs three in one piece."""
    world = World(rows=64, like_gpu=True)
    host = world.residency.host = HostTier(4 * NBYTES, Slab(torch.empty(6 * 256, dtype=torch.uint8)))
    for name in "abc":
        world.touch(_version(name, 16))
    world.residency.forget("digest-b")
    world.touch(_version("d", 24))
    assert [f"digest-{name}" in host for name in "abcd"] == [False, False, True, True]
    assert host.nbytes == 2 * NBYTES


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


@pytest.mark.parametrize("like_gpu", [False, True])
@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.booleans()), max_size=30))
def test_whatever_is_asked_everything_is_served_and_nothing_leaks(
    like_gpu: bool, history: list[tuple[int, int, bool]]
) -> None:
    """Of many more adapters than fit."""
    world = World(rows=8, like_gpu=like_gpu)
    pinned: list[str] = []
    for number, rank, keep in history:
        version = _version(f"{number}-{rank}", rank, extra_bytes=20 * (number % 3))
        slot = world.residency.pin(version)
        if slot is not None:
            pinned.append(version.digest)
            site = world.pool.sites["q"]
            assert (site.a[site.rows[slot]] == value_of(version)).all(), "pinned, and not its own weights"
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
    if like_gpu:
        world.slab.check_integrity()


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
