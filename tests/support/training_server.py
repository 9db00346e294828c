"""A live server with fine-tuning: the fake service, real files and jobs, and fake training processes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import uvicorn

from server.config import from_args
from server.finetune.jobs.training import Training
from server.http.app import create_app
from tests.support.fake_service import FakeService


class _Server(uvicorn.Server):
    """uvicorn that starts and stops fine-tuning on its own event loop, as ``server/serve.py`` does."""

    training: Training

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.training.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self.training.stop()


@dataclass(frozen=True, slots=True)
class TrainingServer:
    """The server's address, and its files and jobs."""

    url: str
    home: Path
    training: Training
    service: FakeService

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=30)


@contextmanager
def training_server(home: Path, service: FakeService, *flags: str) -> Iterator[TrainingServer]:
    config = from_args(["--home", str(home), *flags], {})
    training = Training(config, service)
    app = create_app(service, config.http, training)
    server = _Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    server.training = training
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.005)
        assert thread.is_alive()
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield TrainingServer(url, home, training, service)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def rows(orders: str = "", count: int = 2) -> bytes:
    """A training file that gives ``orders`` to the fake training."""
    messages = [{"role": "user", "content": orders or "hi"}, {"role": "assistant", "content": "yes"}]
    return (json.dumps({"messages": messages}) + "\n").encode() * count
