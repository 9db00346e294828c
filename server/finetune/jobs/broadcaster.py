"""Sends new events of jobs to subscribers. One poll of the database serves all subscribers.

Use it on the event loop only. A subscriber that is new or slow reads missed events from the database.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from server.finetune.jobs.database import JobEvent
from server.finetune.jobs.store import Jobs, NewEvents, is_over
from server.pools import Pool

POLL_INTERVAL = 0.25
"""Seconds between two polls."""
_PAGE = 100
_MAX_BUFFERED = 500
"""Most events in a subscriber's buffer. A slower subscriber reads further events from the database."""


@dataclass(eq=False, slots=True)
class _Subscriber:
    """One subscription to the events of a job.

    Attributes:
        events: the buffer.
        lagging: the database may have events that are not in ``events``.
        over: the job has ended, so there will be no new events.
        failure: why the poller has ended, although the job has not.
    """

    job_id: str
    events: deque[JobEvent] = field(default_factory=deque)
    lagging: bool = True
    over: bool = False
    failure: Exception | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, event: JobEvent) -> None:
        if len(self.events) < _MAX_BUFFERED:
            self.events.append(event)
        else:
            self.lagging = True
        self.woken.set()


class EventBroadcaster:
    """Sends new events to subscribers. One poller runs while there are subscribers."""

    def __init__(self, jobs: Jobs, readers: Pool) -> None:
        self._jobs = jobs
        self._readers = readers
        self._subscribers: dict[str, set[_Subscriber]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def subscribe(self, job_id: str, after: str | None) -> AsyncGenerator[JobEvent, None]:
        """Yields every event of the job after the event ``after`` until the job has ended.

        Close the generator; otherwise the poller may continue to run.

        Raises:
            JobNotKnown: there is no such job.
            InvalidRequest: the job has no event ``after``.
        """
        subscriber = _Subscriber(job_id)
        self._join(subscriber)
        try:
            subscriber.over = is_over(await self._readers.run(self._jobs.get, job_id))
            seen = 0
            while True:
                if subscriber.lagging:
                    subscriber.lagging = False
                    subscriber.events.clear()
                    async for event in self._stored(job_id, after):
                        after, seen = event.id, event.seq
                        yield event
                elif subscriber.events:
                    event = subscriber.events.popleft()
                    if event.seq > seen:
                        after, seen = event.id, event.seq
                        yield event
                elif subscriber.failure is not None:
                    raise subscriber.failure
                elif subscriber.over:
                    return
                else:
                    subscriber.woken.clear()
                    await subscriber.woken.wait()
        finally:
            self._leave(subscriber)

    async def _stored(self, job_id: str, after: str | None) -> AsyncGenerator[JobEvent, None]:
        more = True
        while more:
            page = await self._readers.run(self._jobs.events, job_id, after, _PAGE, ascending=True)
            for event in page.rows:
                after = event.id
                yield event
            more = page.has_more

    def _join(self, subscriber: _Subscriber) -> None:
        self._subscribers.setdefault(subscriber.job_id, set()).add(subscriber)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())

    def _leave(self, subscriber: _Subscriber) -> None:
        others = self._subscribers[subscriber.job_id]
        others.discard(subscriber)
        if not others:
            del self._subscribers[subscriber.job_id]
        if not self._subscribers and self._poller is not None:
            self._poller.cancel()
            self._poller = None

    async def _poll(self) -> None:
        position = None
        while True:
            try:
                batch = await self._readers.run(self._jobs.new_events, position)
            except Exception as error:
                self._fail(error)
                return
            self._dispatch(batch, first=position is None)
            position = batch.position
            if not batch.more:
                await asyncio.sleep(POLL_INTERVAL)

    def _dispatch(self, batch: NewEvents, first: bool) -> None:
        for event in batch.events:
            for subscriber in self._subscribers.get(event.job_id, ()):
                subscriber.offer(event)
        for subscriber in self._all():
            # The first poll yields no events, so those since the subscriber's own look are missing.
            subscriber.lagging |= first
            subscriber.over |= not batch.more and subscriber.job_id not in batch.live
            if first or subscriber.over:
                subscriber.woken.set()

    def _fail(self, error: Exception) -> None:
        for subscriber in self._all():
            subscriber.failure = error
            subscriber.woken.set()

    def _all(self) -> Iterator[_Subscriber]:
        return (subscriber for subscribers in self._subscribers.values() for subscriber in subscribers)
