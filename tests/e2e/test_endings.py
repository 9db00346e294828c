"""How requests and servers end: a client disconnects, and a server gets SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import openai

from tests.e2e.questions import BASE
from tests.support.running_server import SCRIPTS, RunningServer, running
from tests.support.waiting import wait_until


def stream_of(client: openai.OpenAI, tokens: int) -> openai.Stream[openai.types.Completion]:
    """A stream of an answer with exactly ``tokens`` tokens."""
    return client.completions.create(
        model=BASE, prompt="Once upon a time", max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
    )


def test_a_client_that_disconnects_frees_its_slot(server: RunningServer, client: openai.OpenAI) -> None:
    steps = server.metric("engine_steps_total")
    with stream_of(client, tokens=1900) as stream:
        next(stream)
        assert server.metric("requests_running") == 1
    wait_until(lambda: server.metric("requests_running") == 0, 10)
    assert server.metric("engine_steps_total") - steps < 1900


def test_sigterm_lets_a_running_stream_finish(state: Path, tmp_path: Path) -> None:
    command = [str(SCRIPTS / "manylora"), "serve", "--port", "{port}"]
    with running(command, state, tmp_path / "serve.log") as server, server.client() as client:
        with stream_of(client, tokens=150) as stream:
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5)
            last = [chunk.choices[0] for chunk in stream][-1]
        assert last.finish_reason == "length"
        assert server.process.wait(30) == 0
