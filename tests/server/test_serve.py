"""The process listens, drains on a signal while it still answers, and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import serve
from server.config import from_args
from tests.server.fake_engine import FakeEngine, come_true

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def timeout() -> float:
    return 5


@pytest.fixture
async def process(
    engine: FakeEngine, timeout: float, tmp_path: Path
) -> AsyncIterator[tuple[asyncio.Task[None], httpx.AsyncClient]]:
    """The server as a task in this process, with a client and one chat that hangs."""
    listener = serve._bind("127.0.0.1", 0)
    config = from_args(["--home", str(tmp_path), "--shutdown-timeout", str(timeout)], {})
    task = asyncio.create_task(serve.serve(engine, config, listener))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        while True:
            try:
                assert (await client.get("/ready")).status_code == 200
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
        yield task, client
    assert task.done()


async def start_chat(
    engine: FakeEngine, client: httpx.AsyncClient, stream: bool = False
) -> asyncio.Task[httpx.Response]:
    chat = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
    assert await come_true(lambda: bool(engine.running))
    return chat


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_requests_finish(
    engine: FakeEngine, process: tuple[asyncio.Task[None], httpx.AsyncClient], number: int
) -> None:
    task, client = process
    chat = await start_chat(engine, client)
    tell(number)
    assert await come_true(lambda: engine.is_draining)
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    engine.resume.set()
    assert (await chat).json()["choices"][0]["message"]["content"] == " a b c"
    await asyncio.wait_for(task, 5)
    assert engine.stopped


@pytest.mark.parametrize("timeout", [0.05])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_exceeds_the_timeout_gets_an_error(
    engine: FakeEngine, process: tuple[asyncio.Task[None], httpx.AsyncClient], stream: bool
) -> None:
    task, client = process
    chat = await start_chat(engine, client, stream)
    tell(signal.SIGTERM)
    response = await chat
    assert response.status_code == (200 if stream else 503)
    assert "shutting_down" in response.text
    await asyncio.wait_for(task, 5)
    assert engine.stopped
    assert not engine.running


async def test_a_second_signal_ends_at_once(
    engine: FakeEngine, process: tuple[asyncio.Task[None], httpx.AsyncClient]
) -> None:
    task, client = process
    chat = await start_chat(engine, client)
    tell(signal.SIGTERM)
    assert await come_true(lambda: engine.is_draining)
    tell(signal.SIGTERM)
    await asyncio.wait_for(task, 3)
    assert engine.stopped
    chat.cancel()


def test_a_taken_port_is_known_before_the_model_is_loaded() -> None:
    built: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(serve.AddressUnavailable, match=f"--port {port}: .*choose another"):
            serve.run(from_args(["--port", str(port)], {}), built.append)  # type: ignore[arg-type]
    assert not built


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(serve.AddressUnavailable, match=r"--host 203\.0\.113\.9"):
        serve._bind("203.0.113.9", 0)
