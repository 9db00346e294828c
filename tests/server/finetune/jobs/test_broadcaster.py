"""Followers of jobs get every event once and in order, and all followers share one poller."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from server.finetune.jobs import broadcaster as broadcaster_module
from server.finetune.jobs.broadcaster import EventBroadcaster
from server.finetune.jobs.database import Job
from server.finetune.jobs.errors import JobNotKnown
from server.finetune.jobs.store import NewEvents, add_event, find_job
from server.pools import Pool
from tests.server.finetune.jobs.room import Room

LONG = 20.0


@pytest.fixture
def readers() -> Iterator[Pool]:
    pool = Pool("database")
    yield pool
    pool.close()


@pytest.fixture
def broadcaster(room: Room, readers: Pool, monkeypatch: pytest.MonkeyPatch) -> EventBroadcaster:
    monkeypatch.setattr(broadcaster_module, "POLL_INTERVAL", 0.02)
    return EventBroadcaster(room.jobs, readers)


def say(room: Room, job: Job, *messages: str) -> None:
    with room.database.write() as session:
        for message in messages:
            add_event(session, find_job(session, job.id), message)


async def told(broadcaster: EventBroadcaster, job: Job, after: str | None = None) -> list[str]:
    async with asyncio.timeout(LONG), aclosing(broadcaster.subscribe(job.id, after)) as events:
        return [event.message async for event in events]


async def test_two_hundred_followers_poll_as_often_as_one(
    room: Room, broadcaster: EventBroadcaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, looks = room.create(), 0
    real = room.jobs.new_events

    def counted(position: int | None) -> NewEvents:
        nonlocal looks
        looks += 1
        return real(position)

    monkeypatch.setattr(room.jobs, "new_events", counted)
    subscribers = [asyncio.ensure_future(told(broadcaster, job)) for _ in range(200)]
    async with asyncio.timeout(LONG):
        while looks < 5:
            await asyncio.sleep(0.01)
    stored = 0
    real_events = room.jobs.events

    def counted_events(*args: object, **kwargs: object) -> object:
        nonlocal stored
        stored += 1
        return real_events(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(room.jobs, "events", counted_events)
    say(room, job, "one", "two")
    room.jobs.cancel(job.id)
    expected = [f"Created fine-tuning job: {job.id}", "one", "two", "Fine-tuning job cancelled"]
    assert await asyncio.gather(*subscribers) == [expected] * 200
    assert stored == 0, "new events must come from the shared poll"


async def test_a_follower_that_reads_slowly_misses_nothing(
    room: Room, broadcaster: EventBroadcaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcaster_module, "_MAX_BUFFERED", 3)
    job, seen = room.create(), []
    async with asyncio.timeout(LONG), aclosing(broadcaster.subscribe(job.id, None)) as events:
        async for event in events:
            seen.append(event.message)
            if len(seen) == 1:
                say(room, job, *(str(number) for number in range(50)))
                room.jobs.cancel(job.id)
                await asyncio.sleep(0.2)  # meanwhile the poller sends more events than the buffer holds
    assert seen[1:-1] == [str(number) for number in range(50)]
    assert seen[-1] == "Fine-tuning job cancelled"


async def test_events_after_a_cursor(room: Room, broadcaster: EventBroadcaster) -> None:
    job = room.create()
    say(room, job, "one", "two")
    cursor = room.jobs.events(job.id, None, 1).rows[0].id
    room.jobs.cancel(job.id)
    assert await told(broadcaster, job, cursor) == ["Fine-tuning job cancelled"]
    assert await told(broadcaster, job, room.jobs.events(job.id, None, 1).rows[0].id) == []


async def test_a_cancelled_job_is_followed_until_its_process_is_gone(
    room: Room, broadcaster: EventBroadcaster
) -> None:
    job = room.create()
    with room.database.write() as session:
        find_job(session, job.id).child = "1:1"
    room.jobs.cancel(job.id)
    subscriber = asyncio.ensure_future(told(broadcaster, job))
    await asyncio.sleep(0.1)
    assert not subscriber.done()
    say(room, job, "last words")
    with room.database.write() as session:
        find_job(session, job.id).child = None
    assert (await subscriber)[-1] == "last words"


async def test_an_unknown_job(broadcaster: EventBroadcaster) -> None:
    with pytest.raises(JobNotKnown):
        await anext(broadcaster.subscribe("ftjob-none", None))


async def test_without_followers_nothing_polls(room: Room, broadcaster: EventBroadcaster) -> None:
    job = room.create()
    async with aclosing(broadcaster.subscribe(job.id, None)) as events:
        await anext(events)
        assert broadcaster._poller is not None
    assert broadcaster._poller is None
    assert not broadcaster._subscribers


async def test_a_failed_poll_ends_the_streams_but_not_later_ones(
    room: Room, broadcaster: EventBroadcaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = room.create()

    def fail(_: int | None) -> NewEvents:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(room.jobs, "new_events", fail)
        with pytest.raises(OSError, match="disk is gone"):
            await told(broadcaster, job)
    room.jobs.cancel(job.id)
    assert (await told(broadcaster, job))[-1] == "Fine-tuning job cancelled"
