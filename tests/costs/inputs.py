"""A table of every kind of input. A row says how to send it, and in which sizes. Add new kinds as rows.

Any client that reaches the server may send these inputs. The server may refuse them, but it must not fail.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Thread
from typing import Any
from urllib.parse import quote

Address = tuple[str, int]
Send = Callable[[Address, int], None]

KIB, MIB = 1 << 10, 1 << 20
_SENDERS = 3
"""The number of clients that send the same input at the same time."""


@dataclass(frozen=True, slots=True)
class Input:
    """One kind of input.

    Attributes:
        send: sends the input in the given size, and returns after the server has handled it.
        small, large: the sizes in the default run and in the slow run. Each run also sends twice the size.
        unit: the bytes that the server may keep for each unit of the size.
    """

    name: str
    send: Send
    small: int
    large: int
    unit: int = 1


def posted(path: str, body: Callable[[int], bytes], media_type: str = "application/json") -> Send:
    """Several clients POST ``body(size)``."""

    def send(address: Address, size: int) -> None:
        content = body(size)
        _together(lambda: _ask(address, "POST", path, content, media_type))

    return send


def chat(**field: Callable[[int], Any]) -> Send:
    """A chat with one field that grows."""
    return posted("/v1/chat/completions", lambda size: _json(_CHAT | {k: v(size) for k, v in field.items()}))


def text(**field: Callable[[int], Any]) -> Send:
    """A completion with one field that grows."""
    return posted("/v1/completions", lambda size: _json(_TEXT | {k: v(size) for k, v in field.items()}))


def got(path: Callable[[int], str]) -> Send:
    """Several clients GET ``path(size)``."""

    def send(address: Address, size: int) -> None:
        _together(lambda: _ask(address, "GET", path(size)))

    return send


def raw(data: Callable[[int], bytes]) -> Send:
    """Several clients send any bytes and read the start of the answer, if there is one."""

    def send(address: Address, size: int) -> None:
        content = data(size)

        def once() -> None:
            with socket.create_connection(address, timeout=60) as connection, suppress(ConnectionError):
                connection.sendall(content)
                _no_failure(connection.recv(64))

        _together(once)

    return send


def held(data: bytes) -> Send:
    """A number of connections that each send only ``data`` and are then closed."""

    def send(address: Address, size: int) -> None:
        with ExitStack() as stack:
            for _ in range(size):
                connection = stack.enter_context(socket.create_connection(address, timeout=60))
                with suppress(ConnectionError):
                    connection.sendall(data)
            _ask(address, "GET", "/health")

    return send


def never_read(address: Address, size: int) -> None:
    """Clients that request streams of ``size`` tokens with log-probabilities, and never read them."""
    body = _json(_CHAT | {"max_tokens": size, "stream": True, "logprobs": True, "top_logprobs": 20})
    with ExitStack() as stack:
        for _ in range(_SENDERS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address)
            connection.sendall(_POST % len(body) + body)
        _ask(address, "POST", "/v1/chat/completions", _json(_CHAT | {"max_tokens": size}))


def _together(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def kept() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=kept) for _ in range(_SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _ask(address: Address, method: str, path: str, body: bytes = b"", media_type: str = "") -> None:
    connection = HTTPConnection(*address, timeout=60)
    headers = {"Content-Type": media_type or "application/json"} if body else {}
    try:
        connection.request(method, path, body or None, headers)
        status, content = (response := connection.getresponse()).status, response.read()
        assert status != 500, content[:500]
    except ConnectionError:
        pass  # refused before the whole input was sent
    finally:
        connection.close()


def _no_failure(answer: bytes) -> None:
    assert b" 500 " not in answer.split(b"\r\n", 1)[0], answer


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _form(*parts: bytes) -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"


def _part(name: str, content: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content


def _rows(content: Callable[[int], bytes]) -> Send:
    purpose = _part("purpose", b"fine-tune")
    whole = lambda size: _form(purpose, _part("file", content(size), '; filename="x.jsonl"'))  # noqa: E731
    return posted("/v1/files", whole, "multipart/form-data; boundary=b")


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _filters(count: int) -> str:
    return "&".join(f"metadata[k{number}]=v" for number in range(count))


_USER = _user("hi")
_CHAT: dict[str, Any] = {"model": "model", "messages": [_USER], "max_tokens": 4}
_TEXT: dict[str, Any] = {"model": "model", "prompt": "hi", "max_tokens": 4}
_ROW = _json({"messages": [_USER, {"role": "assistant", "content": "yes"}]}) + b"\n"
_GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
_POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)

INPUTS: tuple[Input, ...] = (
    # -- connections, before any key is checked
    Input("one header", raw(lambda n: _GET + b"a: " + b"b" * n), 2 * MIB, 64 * MIB),
    Input("many headers", raw(lambda n: _GET + b"a: b\r\n" * (n // 6) + b"\r\n"), 2 * MIB, 64 * MIB),
    Input("a URL", raw(lambda n: b"GET /" + b"a" * n + b" HTTP/1.1\r\n\r\n"), 2 * MIB, 64 * MIB),
    Input("trailers", raw(lambda n: _GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\na: " + b"b" * n),
          MIB, 32 * MIB),
    Input("requests in one go", raw(lambda n: (_GET + b"\r\n") * n), 500, 50_000, 2 * KIB),
    Input("silent connections", held(b""), 300, 3000, 16 * KIB),
    Input("headers without an end", held(_GET), 300, 3000, 16 * KIB),
    Input("bodies without an end", held(_POST % MIB + b"{" + b" " * 8192), 150, 900, 64 * KIB),
    Input("answers that nobody reads", never_read, 500, 3000, 32 * KIB),
    # -- bodies
    Input("numbers for messages", chat(messages=lambda n: [0] * (n // 3)), 512 * KIB, 3 * MIB),
    Input("messages", chat(messages=lambda n: [_USER] * (n // 34)), 512 * KIB, 3 * MIB),
    Input("parts", chat(messages=lambda n: [_user([{"type": "text", "text": "a"}] * (n // 31))]),
          512 * KIB, 3 * MIB),
    Input("content", chat(messages=lambda n: [_user("word " * (n // 5))]), 512 * KIB, 3 * MIB),
    Input("content without spaces", chat(messages=lambda n: [_user("a" * n)]),
          512 * KIB, 3 * MIB),
    Input("content of escapes", chat(messages=lambda n: [_user("\u0001" * (n // 6))]),
          512 * KIB, 3 * MIB),
    Input("unknown fields", posted("/v1/chat/completions",
          lambda n: _json(_CHAT | {f"field{i}": 1 for i in range(n // 14)})), 512 * KIB, 3 * MIB),
    Input("depth", posted("/v1/chat/completions", lambda n: b"[" * n), 512 * KIB, 3 * MIB),
    Input("quotes", posted("/v1/chat/completions", lambda n: b'"\\' * (n // 2)), 512 * KIB, 3 * MIB),
    Input("spaces", posted("/v1/chat/completions", lambda n: b" " * n), 512 * KIB, 3 * MIB),
    Input("a number", posted("/v1/chat/completions", lambda n: b'{"n": ' + b"9" * n + b"}"),
          512 * KIB, 3 * MIB),
    Input("a model's name", chat(model=lambda n: "a" * n), 512 * KIB, 3 * MIB),
    Input("a user", chat(user=lambda n: "a" * n), 512 * KIB, 3 * MIB),
    Input("stop strings", chat(stop=lambda n: ["a" * n] * 4), 128 * KIB, 512 * KIB),
    Input("biases", chat(logit_bias=lambda n: {str(i): 1 for i in range(n // 12)}), 512 * KIB, 3 * MIB),
    Input("prompts", text(prompt=lambda n: ["a"] * (n // 5)), 512 * KIB, 3 * MIB),
    Input("token ids", text(prompt=lambda n: [7] * (n // 3)), 512 * KIB, 3 * MIB),
    Input("stop token ids", text(stop_token_ids=lambda n: [7] * (n // 3)), 512 * KIB, 3 * MIB),
    # -- uploads, jobs, queries
    Input("rows", _rows(lambda n: _ROW * (n // len(_ROW))), 128 * KIB, 4 * MIB),
    Input("bad rows", _rows(lambda n: b"{}\n" * (n // 3)), 32 * KIB, 512 * KIB),
    Input("a row", _rows(lambda n: b'{"messages": "' + b"a" * n + b'"}\n'), 512 * KIB, 16 * MIB),
    Input("rows that nest", _rows(lambda n: b"[" * n + b"\n"), 512 * KIB, 16 * MIB),
    Input("fields of a form", posted("/v1/files", lambda n: _form(*[_part("purpose", b"x")] * (n // 60)),
          "multipart/form-data; boundary=b"), 256 * KIB, 4 * MIB),
    Input("a part's header", posted("/v1/files", lambda n: b"--b\r\n" + b"a: " + b"b" * n,
          "multipart/form-data; boundary=b"), MIB, 16 * MIB),
    Input("a job's modules", posted("/v1/fine_tuning/jobs",
          lambda n: _json({"model": "model", "training_file": "f", "target_modules": ["a"] * (n // 5)})),
          512 * KIB, 3 * MIB),
    Input("filters", got(lambda n: "/v1/fine_tuning/jobs?" + _filters(n // 18)), 3 * KIB, 3 * KIB),
    Input("a model in the path", got(lambda n: "/v1/models/" + quote("ä" * (n // 6))), 3 * KIB, 3 * KIB),
    Input("an adapter's path", posted("/v1/load_lora_adapter",
          lambda n: _json({"lora_name": "a", "lora_path": "a/" * (n // 2)})), 512 * KIB, 3 * MIB),
)  # fmt: skip
