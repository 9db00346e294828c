"""The events of jobs as they come: one look at the database for everybody who follows, however many.

Lives on the event loop. What a follower has missed (it begins, or reads too slowly) it reads by itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from server.finetune.jobs.database import JobEvent
from server.finetune.jobs.store import Jobs, News, is_over
from server.pools import Pool

POLL_INTERVAL = 0.25
"""Seconds between two looks for new events."""
_PAGE = 100
_MOST_KEPT = 500
"""Events kept for a follower that is slow to take them; then it reads them from the database instead."""


@dataclass(eq=False, slots=True)
class _Follower:
    """Who follows one job.

    Attributes:
        behind: events may be in the database that are not in ``events``.
        over: the job has ended; nothing comes after what is told by now.
        failure: why no more events come, although the job has not ended.
    """

    job_id: str
    events: deque[JobEvent] = field(default_factory=deque)
    behind: bool = True
    over: bool = False
    failure: Exception | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, event: JobEvent) -> None:
        if len(self.events) < _MOST_KEPT:
            self.events.append(event)
        else:
            self.behind = True
        self.woken.set()


class Feed:
    """Tells followers of new events, from one poller that runs while there are any."""

    def __init__(self, jobs: Jobs, readers: Pool) -> None:
        self._jobs = jobs
        self._readers = readers
        self._followers: dict[str, set[_Follower]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, after: str | None) -> AsyncGenerator[JobEvent, None]:
        """Every event of the job after the one with the id ``after``, until the job has ended.

        Raises JobNotKnown, or InvalidRequest for ``after``. Close it, or its poller may run on.
        """
        follower = _Follower(job_id)
        self._join(follower)
        try:
            follower.over = is_over(await self._readers.run(self._jobs.get, job_id))
            seen = 0
            while True:
                if follower.behind:
                    follower.behind = False
                    follower.events.clear()
                    async for event in self._stored(job_id, after):
                        after, seen = event.id, event.seq
                        yield event
                elif follower.events:
                    event = follower.events.popleft()
                    if event.seq > seen:
                        after, seen = event.id, event.seq
                        yield event
                elif follower.failure is not None:
                    raise follower.failure
                elif follower.over:
                    return
                else:
                    follower.woken.clear()
                    await follower.woken.wait()
        finally:
            self._leave(follower)

    async def _stored(self, job_id: str, after: str | None) -> AsyncGenerator[JobEvent, None]:
        more = True
        while more:
            page = await self._readers.run(self._jobs.events, job_id, after, _PAGE, ascending=True)
            for event in page.rows:
                after = event.id
                yield event
            more = page.has_more

    def _join(self, follower: _Follower) -> None:
        self._followers.setdefault(follower.job_id, set()).add(follower)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())

    def _leave(self, follower: _Follower) -> None:
        others = self._followers[follower.job_id]
        others.discard(follower)
        if not others:
            del self._followers[follower.job_id]
        if not self._followers and self._poller is not None:
            self._poller.cancel()
            self._poller = None

    async def _poll(self) -> None:
        position = None
        while True:
            try:
                news = await self._readers.run(self._jobs.news, position)
            except Exception as error:
                self._fail(error)
                return
            self._tell(news, first=position is None)
            position = news.position
            if not news.more:
                await asyncio.sleep(POLL_INTERVAL)

    def _tell(self, news: News, first: bool) -> None:
        for event in news.events:
            for follower in self._followers.get(event.job_id, ()):
                follower.offer(event)
        for follower in self._all():
            follower.behind |= first  # what came between its own look and this one is in neither
            follower.over |= not news.more and follower.job_id not in news.live
            if first or follower.over:
                follower.woken.set()

    def _fail(self, error: Exception) -> None:
        for follower in self._all():
            follower.failure = error
            follower.woken.set()

    def _all(self) -> Iterator[_Follower]:
        return (follower for followers in self._followers.values() for follower in followers)
