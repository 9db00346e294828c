"""Costly bodies: checking stops at the first error, and more errors cost no more."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.config import HttpConfig
from server.errors import InvalidRequest
from server.http import context as context_module
from server.http import limits
from server.http.adapters_schema import LoadAdapter
from server.http.app import create_app
from server.http.body import MAX_ITEMS, MAX_NAMES, MAX_VALUES
from server.http.fine_tuning_schema import CreateJob
from server.http.limits import SMALL_BODY, parse_body
from server.http.messages_schema import MAX_PARTS
from server.http.schema import ChatBody, CompletionBody
from tests.server.http.live_server import live_server
from tests.support.fake_service import FakeService
from tests.support.waiting import wait_until

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi"}
JOB: dict[str, Any] = {"model": "tiny", "training_file": "file-1"}
LOAD: dict[str, Any] = {"lora_name": "a", "lora_path": "a"}
MANY = 100_000
NAMES = MAX_NAMES - 10


def refused(model: type[BaseModel], body: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(json.dumps(body).encode(), model)
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatBody, CHAT | {"messages": [0] * MANY}, "messages"),
        (ChatBody, CHAT | {"messages": [0] * MAX_ITEMS}, "messages"),
        (ChatBody, CHAT | {"messages": [{}] * MAX_ITEMS}, "messages.0"),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": [0] * MANY}]}, "messages"),
        (ChatBody, CHAT | {"messages": [{"role": "user", "content": [0] * MAX_ITEMS}]}, "messages.0.content"),
        (ChatBody, CHAT | {"messages": [{str(number): 1 for number in range(NAMES)}]}, "messages.0"),
        (ChatBody, CHAT | {str(number): 1 for number in range(NAMES)}, None),
        (ChatBody, CHAT | {str(number): 1 for number in range(1000)}, "0"),
        (ChatBody, CHAT | {"stop": [1] * MANY}, "stop"),
        (ChatBody, CHAT | {"stop_token_ids": ["x"] * MANY}, "stop_token_ids"),
        (ChatBody, CHAT | {"logit_bias": {str(number): "x" for number in range(NAMES)}}, "logit_bias"),
        (ChatBody, CHAT | {"metadata": {str(number): 1 for number in range(NAMES)}}, "metadata"),
        (ChatBody, CHAT | {"stream_options": {str(number): 1 for number in range(NAMES)}}, "stream_options"),
        (CompletionBody, TEXT | {"prompt": [[]] * MANY}, "prompt"),
        (CompletionBody, TEXT | {"prompt": [-1] * MANY}, "prompt"),
        (CreateJob, JOB | {"metadata": {str(number): 1 for number in range(NAMES)}}, "metadata"),
        (CreateJob, JOB | {"target_modules": [0] * MANY}, "target_modules"),
        (LoadAdapter, LOAD | {"lora_path": [0] * MANY}, "lora_path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_one_wrong_item_costs_as_much_as_many(
    model: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    data = json.dumps(body).encode()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as caught:
            parse_body(data, model)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value.param or "").startswith(param or "")
    assert len(str(caught.value)) < 2000
    assert peak < 30 * len(data) + 1_000_000  # the values take 30 bytes each; an error for each took hundreds


def test_the_largest_conversation_is_served() -> None:
    messages = [{"role": "user", "content": "x"}] * MAX_ITEMS
    assert len(parse_body(json.dumps(CHAT | {"messages": messages}).encode(), ChatBody).messages) == MAX_ITEMS
    parts = [{"type": "text", "text": "x"}] * (MAX_PARTS // 4)
    parse_body(json.dumps(CHAT | {"messages": [{"role": "user", "content": parts}] * 4}).encode(), ChatBody)
    error = refused(ChatBody, CHAT | {"messages": [{"role": "user", "content": parts}] * 5})
    assert (error.param, str(MAX_PARTS) in str(error)) == ("messages", True)


def test_too_long_a_list_is_refused_in_openais_words() -> None:
    error = refused(ChatBody, CHAT | {"messages": CHAT["messages"] * (MAX_ITEMS + 1)})
    assert error.code == "array_above_max_length"
    assert str(error) == (
        "'messages': array too long. Expected an array with maximum length 2048, "
        "but got an array with length 2049 instead."
    )


class TestValues:
    def test_too_many_are_refused_before_they_are_parsed(self) -> None:
        data = b'{"model":"tiny","prompt":[' + b"0," * (MAX_VALUES + 1) + b"0]}"
        with pytest.raises(InvalidRequest, match=f"more than {MAX_VALUES} values"):
            parse_body(data, CompletionBody)

    def test_too_many_names_are_refused_before_they_are_parsed(self) -> None:
        data = json.dumps(CHAT | {str(number): 1 for number in range(MAX_NAMES)}).encode()
        with pytest.raises(InvalidRequest, match=f"more than {MAX_NAMES} names"):
            parse_body(data, ChatBody)

    def test_colons_in_texts_do_not_count_as_names(self) -> None:
        parse_body(json.dumps(TEXT | {"prompt": '":"' * MAX_NAMES}).encode(), CompletionBody)

    def test_as_many_token_ids_as_allowed(self) -> None:
        ids = [7] * (MAX_VALUES - 10)
        (prompt,) = parse_body(json.dumps(TEXT | {"prompt": ids}).encode(), CompletionBody).prompt
        assert prompt == tuple(ids)

    @pytest.mark.parametrize("text", [",", '",', "\\\\,", '\\",{[', 'a"b,[{\\'])
    def test_commas_and_brackets_in_texts_do_not_count_as_values(self, text: str) -> None:
        body = TEXT | {"prompt": text * (MAX_VALUES // max(1, text.count(",")) + 7)}
        assert parse_body(json.dumps(body).encode(), CompletionBody).prompt == (body["prompt"],)

    @pytest.mark.parametrize("item", ['"",', '"\\\\",', '"\\"",', '{"a":"["},', '"' + "x" * 30 + '",'])
    def test_texts_are_recognised_across_pieces(self, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pieces may end anywhere, inside strings and next to their quotes."""
        monkeypatch.setattr(limits, "MAX_VALUES", 1000)
        monkeypatch.setattr(limits, "_PIECE", 7)
        values = item.count(",") + item.count("{")
        for count, many in ((1000 // values - 2, False), (1000 // values + 3, True)):
            data = b"[" + item.encode() * count + b'",,,,[[[[' + b"," * 1000 + b'"]'
            assert limits._has_many_values(data) is many

    def test_unclosed_quotes_and_escapes_take_linear_time(self) -> None:
        """A careless regular expression is quadratic here, and would take minutes."""
        for data in (rb'"' + rb"\"" * 2_000_000, b"[]{}" * 1_000_000, b'"",' * 2_000_000, b"\\" * 8_000_000):
            with pytest.raises(InvalidRequest):
                parse_body(data, ChatBody)


@pytest.mark.parametrize(("size", "on_the_loop"), [(SMALL_BODY // 2, True), (SMALL_BODY * 2, False)])
def test_large_bodies_are_parsed_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, size: int, on_the_loop: bool
) -> None:
    threads: list[str] = []
    real: Callable[..., Any] = parse_body

    def noting(body: bytes, model: type[BaseModel]) -> Any:
        threads.append(threading.current_thread().name)
        return real(body, model)

    monkeypatch.setattr(limits, "parse_body", noting)
    client.post("/v1/chat/completions", json=CHAT | {"user": "x" * size})
    assert [name.startswith("bodies") for name in threads] == [not on_the_loop]


async def test_large_bodies_that_wait_are_bounded(
    service: FakeService, config: HttpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise clients that send and disconnect could fill the memory."""
    monkeypatch.setattr(context_module, "MAX_LARGEST_BODIES", 1)
    rendering, resume, real = asyncio.Event(), asyncio.Event(), service.render_chat

    async def slow(messages: list[dict[str, str]], _: object) -> list[int]:
        rendering.set()
        await resume.wait()
        return (await real(messages))[:8]

    monkeypatch.setattr(service, "render_chat", slow)
    app = create_app(service, replace(config, max_body_bytes=2 * SMALL_BODY))
    large = CHAT | {"max_tokens": 2, "messages": [{"role": "user", "content": "x" * (SMALL_BODY * 3 // 2)}]}
    url, transport = "/v1/chat/completions", httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        first = asyncio.ensure_future(client.post(url, json=large))
        await rendering.wait()
        refused = await client.post(url, json=large)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        small = asyncio.ensure_future(client.post(url, json=CHAT | {"max_tokens": 2}))
        resume.set()
        assert [each.status_code for each in await asyncio.gather(first, small)] == [200, 200]
        assert (await client.post(url, json=large)).status_code == 200
        assert (await client.post(url, json=large | {"model": "none"})).status_code == 404
        assert (await client.post(url, json=large)).status_code == 200, "a refused body must be freed"


class TestBodiesThatCome:
    """A body takes memory before it is complete."""

    @pytest.fixture
    def address(
        self, service: FakeService, config: HttpConfig, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        monkeypatch.setattr(context_module, "MAX_LARGEST_BODIES", 2)
        with live_server(service, replace(config, max_body_bytes=4 * SMALL_BODY)) as address:
            yield address

    def test_the_body_that_has_arrived_for_longest_is_refused(self, address: str) -> None:
        first, second, third = (send_most(address, 4 * SMALL_BODY) for _ in range(3))
        assert first.recv(1000).startswith(b"HTTP/1.1 429 ")
        for each in (second, third):
            each.sendall(b'"}]}' + b" " * 6)
            assert each.recv(1000).startswith(b"HTTP/1.1 400 "), "the whole body was read: 'model' is missing"

    def test_small_bodies_are_still_accepted(self, address: str) -> None:
        slow = [send_most(address, 4 * SMALL_BODY) for _ in range(2)]
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT | {"max_tokens": 2}).status_code == 200
        for each in slow:
            each.close()

    def test_bodies_of_disconnected_clients_are_freed(self, address: str) -> None:
        for _ in range(6):
            send_most(address, 4 * SMALL_BODY).close()
        large = CHAT | {"user": "x" * 3 * SMALL_BODY}
        wait_until(
            lambda: httpx.post(f"{address}/v1/chat/completions", json=large).status_code == 400
        )  # 'user' is too long


def send_most(address: str, size: int) -> socket.socket:
    """A connection that has sent a chat of ``size`` bytes, except the last ten."""
    url = urlsplit(address)
    connection = socket.create_connection((url.hostname, url.port), timeout=10)
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}"
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode())
    connection.sendall(b'{"messages":[{"role":"user","content":"'.ljust(size - 10, b"x"))
    return connection


def test_a_name_of_any_length_is_repeated_shortened() -> None:
    assert len(str(refused(ChatBody, CHAT | {"x" * 100_000: 1}))) < 300
    assert len(str(refused(ChatBody, CHAT | {"metadata": {"x" * 100_000: 1}}))) < 300
    assert len(str(refused(ChatBody, CHAT | {"logit_bias": {"x" * 100_000: 1}}))) < 300
