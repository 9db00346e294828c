"""Pools of threads are limited, independent of one another, and end when they are closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.pools import POOLS, Pool


async def test_one_kind_of_work_never_waits_for_another() -> None:
    held, slow, quick = threading.Event(), Pool("database-writes"), Pool("tokenizing")
    waiting = [asyncio.ensure_future(slow.run(held.wait)) for _ in range(50)]
    async with asyncio.timeout(5):
        assert await quick.run(len, "text") == 4
    held.set()
    assert await asyncio.gather(*waiting) == [True] * 50
    slow.close()
    quick.close()


@pytest.mark.parametrize("kind", POOLS)
async def test_no_more_threads_than_declared(kind: str) -> None:
    pool, names = Pool(kind), set()  # type: ignore[arg-type]

    def note() -> None:
        names.add(threading.current_thread().name)

    await asyncio.gather(*(pool.run(note) for _ in range(20)))
    assert 1 <= len(names) <= POOLS[kind]  # type: ignore[index]
    assert all(name.startswith(kind) for name in names)
    pool.close()


async def test_cancelled_work_does_not_start() -> None:
    held, pool = threading.Event(), Pool("database-writes")
    begun: list[int] = []
    first = asyncio.ensure_future(pool.run(held.wait))
    second = asyncio.ensure_future(pool.run(begun.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    held.set()
    assert await first
    pool.close()
    assert begun == []


async def test_errors_are_raised_and_a_closed_pool_refuses_work() -> None:
    pool = Pool("disk")
    with pytest.raises(ValueError, match="invalid literal"):
        await pool.run(int, "x")
    pool.close()
    with pytest.raises(RuntimeError):
        await pool.run(int, "1")
