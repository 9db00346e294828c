"""A small fake OpenAI server that answers at once: a base, two adapters, and models with faults.

``python -m tests.server.bench.fake_server PORT`` serves it on loopback.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.bench.peers.http import free_port

ADAPTERS = ("lora-0000", "lora-0001")


class FakeServer:
    """The application and the request bodies it received."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: Response()),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _models(self, _: Request) -> JSONResponse:
        adapters = [{"id": name, "parent": "base"} for name in ADAPTERS]
        return JSONResponse({"object": "list", "data": [{"id": "base", "parent": None}, *adapters]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "missing":
            return JSONResponse({"error": {"message": "no such model", "code": "model_not_found"}}, 404)
        chunks = list(_chat_chunks(body)) if "messages" in body else list(_text_chunks(body))
        if body["model"] == "short":
            del chunks[-1]
        return StreamingResponse(iter(chunks), media_type="text/event-stream")


def _text_chunks(body: dict[str, Any]) -> Iterator[str]:
    """One chunk for each token, then usage and the end."""
    last = body["max_tokens"] - 1
    for place in range(last + 1):
        yield _event({"text": " x", "finish_reason": "length" if place == last else None})
    yield _usage(len(body["prompt"]), body["max_tokens"])
    yield "data: [DONE]\n\n"


def _chat_chunks(body: dict[str, Any]) -> Iterator[str]:
    """A chunk with the role, one for each token, one with the finish reason, then usage and the end."""
    yield _event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    for _ in range(body["max_tokens"]):
        yield _event({"delta": {"content": " x"}, "finish_reason": None})
    yield _event({"delta": {}, "finish_reason": "length"})
    yield _usage(len(body["messages"][0]["content"].split()), body["max_tokens"])
    yield "data: [DONE]\n\n"


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"


def _usage(prompt: int, output: int) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    """The base URL of ``fake``, which a thread serves during the test."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(fake.app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    uvicorn.run(FakeServer().app, port=int(sys.argv[1]), log_level="error")
