from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterInvalid, AdapterOutOfMemory, AdapterTooLarge
from adapters.pool.host_tier import HostTier
from adapters.pool.pinned_buffer import PinnedBuffer
from adapters.registry import Version
from tests.support.residency import NBYTES, Pool, World, make_version, value_of


def test_a_cold_adapter_is_loaded_in_the_background_and_then_pinned() -> None:
    world = World()
    version = make_version("a")
    world.gate.clear()
    assert world.residency.pin(version) is None
    assert world.residency.tier(version.digest) == "disk"
    world.gate.set()
    world.settled()
    assert world.residency.pin(version) == 0
    assert world.residency.tier(version.digest) == "device"
    assert world.residency.pins == 1


def test_the_least_recently_used_is_evicted_and_reloaded_from_the_host() -> None:
    world = World(rows=8)
    a, b, c = (make_version(name) for name in "abc")
    for version in (a, b, a, c):
        world.touch(version)
    assert [world.residency.tier(v.digest) for v in (a, b, c)] == ["device", "host", "device"]
    world.touch(b)
    assert world.reads == ["a", "b", "c"], "an adapter in the host tier must not be read again"
    assert world.residency.stats.evictions == 2


def test_the_host_tier_is_bounded() -> None:
    world = World(rows=4, host_adapters=2)
    for name in "abcd":
        world.touch(make_version(name))
    assert world.residency.host.nbytes == 2 * NBYTES
    world.touch(make_version("a"))
    assert world.reads == ["a", "b", "c", "d", "a"]


def test_extras_need_room_like_rows() -> None:
    world = World(rows=40)
    small, large, plain = make_version("small", 1, 40), make_version("large", 1, 70), make_version("plain", 1)
    world.pin(small)
    assert world.residency.pin(large) is None
    world.settled()
    assert world.residency.pin(small) is None, "small must drain"
    assert world.pin(plain) is not None, "plain has no extras, so it does not have to drain"
    world.residency.unpin(small.digest)
    world.pin(large)
    world.residency.check_integrity()
    assert [world.residency.tier(v.digest) for v in (small, large, plain)] == ["host", "device", "device"]


def test_extras_that_can_never_fit_are_refused_with_the_remedy() -> None:
    world = World()
    version = make_version("a", 1, 101)
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterTooLarge, match=r"101 bytes besides its rank rows.*--lora-extra-memory"):
        world.residency.pin(version)


def test_a_pinned_adapter_is_never_evicted() -> None:
    world = World(rows=8)
    a = make_version("a")
    slot = world.pin(a)
    for name in "bcdef":
        world.touch(make_version(name))
    assert world.residency.pin(a) == slot


def test_a_newly_loaded_one_is_kept_for_its_requester() -> None:
    world = World(rows=4)
    a, b = make_version("a"), make_version("b")
    world.residency.pin(a)
    world.settled()
    world.residency.pin(b)
    world.settled()
    assert world.residency.pin(a) is not None, "b must not take a's rows before a is used"


def test_the_least_pinned_adapters_drain_until_the_first_in_the_queue_is_served() -> None:
    world = World(rows=8)
    popular, quiet, cold = make_version("popular"), make_version("quiet"), make_version("cold")
    world.pin(popular)
    world.pin(popular)
    world.pin(quiet)
    assert world.residency.pin(cold) is None
    world.settled()
    assert world.residency.pin(cold) is None
    assert world.residency.pin(popular) is not None, "popular has two pins, so it must not drain"
    assert world.residency.pin(quiet) is None, "quiet must drain"
    world.residency.unpin(quiet.digest)
    assert world.pin(cold) is not None
    assert world.residency.tier(quiet.digest) == "host"


def test_an_adapter_is_queued_as_long_as_it_has_requesters() -> None:
    world = World(rows=4)
    a, cold = make_version("a"), make_version("cold")
    world.pin(a)
    for requester in ("first", "second"):
        assert world.residency.pin(cold, requester) is None
    world.settled()
    world.now += 3600
    world.residency.cancel(cold.digest, "first")
    assert world.residency.pin(a) is None, "a must drain"
    world.residency.cancel(cold.digest, "second")
    assert world.residency.pin(a) is not None


def test_an_adapter_loaded_for_a_requester_stays_until_it_is_used() -> None:
    world = World(rows=4)
    a, b = make_version("a"), make_version("b")
    assert not world.residency.prepare(a, "waits for a place")
    world.settled()
    world.now += 3600
    world.residency.pin(b, "comes later")
    world.settled()
    assert world.residency.prepare(a, "waits for a place")
    world.residency.cancel(a.digest, "waits for a place")
    assert world.residency.pin(b, "comes later") is None
    world.settled()
    assert world.residency.pin(b, "comes later") is not None


def test_nothing_is_loaded_for_cancelled_requesters() -> None:
    world = World(rows=4)
    world.gate.clear()
    for name in "ab":
        world.residency.prepare(make_version(name), "requester")
        world.residency.cancel(f"digest-{name}", "requester")
    world.gate.set()
    world.settled()
    assert world.reads in ([], ["a"]), "at most one load may have begun"


def test_an_adapter_is_resident_only_after_its_copies_are_done() -> None:
    world = World(like_gpu=True)
    assert isinstance(world.pool, Pool)
    events = world.pool.events
    world.residency.on_change = lambda: events.append(world.residency.tier("digest-a"))
    world.touch(make_version("a"))
    assert events == ["digest-a is written", "device"]


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_fails_only_the_requesters(
    fault: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(like_gpu=True)
    assert isinstance(world.pool, Pool)
    a, b = make_version("a"), make_version("b")
    world.pin(a)
    world.pool.fault = fault
    world.residency.pin(b)
    world.settled()
    with pytest.raises(AdapterOutOfMemory, match=r"'b'.*--gpu-memory-utilization"):
        world.residency.pin(b)
    assert vars(caplog.records[0])["fields"] == {
        "name": "b",
        "digest": "digest-b",
        "version": 0.0,
        "tier": "host",
        "reason": str(fault),
    }
    assert world.pool.rows_used == 4, "b's rows must be free again"
    world.residency.check_integrity()
    world.pool.fault = None
    assert world.residency.pin(a) is not None
    world.pin(b)
    assert world.reads == ["a", "b"], "b must stay in the host tier"


def test_a_fragmented_host_tier_makes_room_for_a_larger_adapter() -> None:
    """The pinned buffer has six units. a, b and c take two each, b goes, and d needs three in one piece."""
    world = World(rows=64, like_gpu=True)
    host = world.residency.host = HostTier(4 * NBYTES, PinnedBuffer(torch.empty(6 * 256, dtype=torch.uint8)))
    for name in "abc":
        world.touch(make_version(name, 16))
    world.residency.forget("digest-b")
    world.touch(make_version("d", 24))
    assert [f"digest-{name}" in host for name in "abcd"] == [False, False, True, True]
    assert host.nbytes == 2 * NBYTES


def test_a_failure_is_reported_once_and_then_loading_is_retried() -> None:
    world = World()
    version = make_version("a")
    world.broken["a"] = AdapterInvalid("it is broken")
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterInvalid, match="broken"):
        world.residency.pin(version)
    del world.broken["a"]
    world.touch(version)
    assert world.residency.tier(version.digest) == "device"


def test_a_failure_is_reported_only_to_requesters_that_waited() -> None:
    world = World()
    version = make_version("a")
    world.broken["a"] = AdapterInvalid("it is broken")
    for requester in ("first", "second", "leaves"):
        world.residency.pin(version, requester)
    world.settled()
    world.residency.cancel(version.digest, "leaves")
    del world.broken["a"]
    assert world.residency.pin(version, "later") is None
    world.settled()
    assert world.residency.pin(version, "later") is not None
    for requester in ("first", "second"):
        with pytest.raises(AdapterInvalid, match="broken"):
            world.residency.pin(version, requester)
    assert world.reads == ["a", "a"]


def test_the_failure_of_a_folder_is_not_reported_for_another_with_the_same_content() -> None:
    world = World()
    here, there = make_version("here"), make_version("there")
    there = Version("there", here.digest, Path("there"), here.info, 0.0)
    world.broken["here"] = AdapterInvalid("it cannot be read")
    world.residency.pin(here, "one")
    world.residency.pin(there, "other")
    world.settled()
    assert world.residency.pin(there, "other") is None
    world.settled()
    assert world.residency.pin(there, "other") is not None
    with pytest.raises(AdapterInvalid, match="cannot be read"):
        world.residency.pin(here, "one")


def test_a_rank_that_can_never_fit_is_refused_with_the_remedy() -> None:
    world = World(rows=8)
    version = make_version("a", rank=9)
    world.residency.pin(version)
    world.settled()
    with pytest.raises(AdapterTooLarge, match="--lora-pool-rows"):
        world.residency.pin(version)


def test_forgetting_frees_device_and_host_with_the_last_pin() -> None:
    world = World()
    version = make_version("a")
    world.pin(version)
    world.residency.forget(version.digest)
    assert world.residency.host.nbytes == 0
    assert world.residency.pool.rows_used == 4, "a request still uses it"
    world.residency.unpin(version.digest)
    assert world.residency.pool.rows_used == 0
    gc.collect()
    assert [reference() for reference in world.weights] == [None], "its weights must be in memory"


def test_forgetting_while_it_loads_leaves_nothing() -> None:
    world = World()
    version = make_version("a")
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
def test_every_requester_is_served_and_nothing_leaks(
    like_gpu: bool, history: list[tuple[int, int, bool]]
) -> None:
    """There are many more adapters than fit."""
    world = World(rows=8, like_gpu=like_gpu)
    pinned: list[str] = []
    for number, rank, keep in history:
        version = make_version(f"{number}-{rank}", rank, extra_bytes=20 * (number % 3))
        slot = world.residency.pin(version, requester=number)
        if slot is not None:
            pinned.append(version.digest)
            site = world.pool.sites["q"]
            assert (site.a[site.rows[slot]] == value_of(version)).all(), (
                "a pinned slot has another adapter's weights"
            )
        world.settled()
        if pinned and not keep:
            world.residency.unpin(pinned.pop(0))
        if not keep:
            world.residency.cancel(version.digest, number)
        world.residency.check_integrity()
    for digest in pinned:
        world.residency.unpin(digest)
    for number, rank, _ in history:
        world.residency.cancel(make_version(f"{number}-{rank}").digest, number)
    world.touch(make_version("last", 8))
    world.residency.check_integrity()
    assert world.residency.pins == 0
    if like_gpu:
        world.pinned.check_integrity()


def test_many_threads_request_at_once() -> None:
    world = World(rows=8)

    def ask(seed: int) -> None:
        for i in range(60):
            version = make_version(f"v{(seed * 7 + i) % 5}")
            if world.residency.pin(version, requester=seed) is not None:
                world.residency.unpin(version.digest)
            world.residency.cancel(version.digest, seed)

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
