"""Looking up unknown adapters: looks are shared, remembered and bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from server.engine import lookup as module
from server.engine.lookup import AdapterLookup


class Looker:
    """Counts looks. No look ends while ``may_end`` is clear. ``now`` is the time."""

    def __init__(self) -> None:
        self.looks: list[str] = []
        self.may_end = threading.Event()
        self.may_end.set()
        self.now = 100.0
        self.lookup = AdapterLookup(self._look, lambda: self.now)

    def _look(self, name: str) -> None:
        self.looks.append(name)
        assert self.may_end.wait(10)
        if name == "boom":
            raise OSError("the disk is gone")


@pytest.fixture
def looker() -> Iterator[Looker]:
    looker = Looker()
    yield looker
    looker.may_end.set()
    looker.lookup.close()


async def test_a_look_is_remembered_for_a_while(looker: Looker) -> None:
    for _ in range(3):
        await looker.lookup.look_for("a")
    assert looker.looks == ["a"]
    looker.now += module.REMEMBERED_SECONDS
    await looker.lookup.look_for("a")
    assert looker.looks == ["a", "a"]


async def test_concurrent_requests_share_a_look(looker: Looker) -> None:
    looker.may_end.clear()
    askers = [asyncio.create_task(looker.lookup.look_for("a")) for _ in range(20)]
    await asyncio.sleep(0)
    askers[0].cancel()  # the request that began the look
    looker.may_end.set()
    await asyncio.gather(*askers, return_exceptions=True)
    assert looker.looks == ["a"]


async def test_the_number_of_concurrent_looks_is_bounded(
    looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LOOKS", 3)
    looker.may_end.clear()
    askers = [asyncio.create_task(looker.lookup.look_for(f"a{i}")) for i in range(10)]
    done, pending = await asyncio.wait(askers, timeout=0.1)
    assert (len(done), len(pending)) == (7, 3)
    looker.may_end.set()
    await asyncio.gather(*askers)
    assert sorted(looker.looks) == ["a0", "a1", "a2"]


async def test_the_number_of_remembered_looks_is_bounded(
    looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 5)
    for i in range(20):
        await looker.lookup.look_for(f"a{i}")
    assert len(looker.lookup._remembered) == 5


async def test_a_slow_look_is_not_waited_for(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    looker.may_end.clear()
    await looker.lookup.look_for("a")
    assert looker.looks == ["a"]


async def test_a_look_that_fails_is_logged(looker: Looker, caplog: pytest.LogCaptureFixture) -> None:
    await looker.lookup.look_for("boom")
    assert "looking up adapter boom failed" in caplog.text


@pytest.mark.parametrize("name", ["", "../a", "a" * 300, "a\nb", "a.tmp", "\ud800"])
async def test_invalid_names_are_not_looked_up(looker: Looker, name: str) -> None:
    await looker.lookup.look_for(name)
    assert looker.looks == []
