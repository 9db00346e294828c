"""``manylora serve`` with the fake service and fake training, as a process that tests kill."""

from __future__ import annotations

import sys

from server import serve
from server.config import ServerConfig, from_args
from server.finetune.jobs import command, runner
from tests.support import fake_train
from tests.support.fake_service import FakeService


class FakeEngine(FakeService):
    """A fake service that starts and ends at once."""

    async def start(self) -> None:
        pass

    async def drain(self, timeout: float) -> bool:  # noqa: ARG002
        return True

    def stop(self) -> None:
        pass


def build(_: ServerConfig) -> FakeEngine:
    return FakeEngine()


if __name__ == "__main__":
    command.PROGRAM = fake_train.COMMAND
    runner.BUSY_INTERVAL = 0.02
    serve.run(from_args(sys.argv[1:], {}), build)
