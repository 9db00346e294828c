"""The fake service with the start and end of a real engine, for tests of the server's process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.support.fake_service import FakeService


class FakeEngine(FakeService):
    """A fake service that can be started and ended. Its requests hang before their second token."""

    stopped = False

    async def start(self) -> None:
        self.hang_at = 1

    async def drain(self, timeout: float) -> bool:
        self.is_draining = True
        return await come_true(lambda: not self.running, timeout)

    def stop(self) -> None:
        self.stopped = True


async def come_true(condition: Callable[[], bool], seconds: float = 5) -> bool:
    for _ in range(int(seconds * 100)):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return condition()
