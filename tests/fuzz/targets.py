"""The targets of fuzzing. A target takes bytes, and raises only if the code under test has a fault.

Errors that the code raises on purpose are not faults if their messages are short and can be sent as JSON.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.requests import Request
from starlette.types import Message

from adapters.artifact.config import parse_config
from adapters.artifact.header import Header, TensorEntry, header_limits, read_header
from adapters.artifact.plan import plan_adapter
from adapters.errors import ManyloraError
from adapters.sites import BaseLayout, Site
from adapters.training.dataset import read_dataset
from server.http import fields
from server.http.multipart import body_blocks, form_of

MAX_MESSAGE = 4000
"""The most characters of an error. Errors about rows of a data file are the longest."""
BOUNDARY = b"boundary"

_Q = "model.layers.0.self_attn.q_proj"
_SITES = {_Q: Site(_Q, 8, 6)}
_MODULES = {"", "model", "model.embed_tokens", "model.layers", "model.layers.0", "model.layers.0.self_attn"}
LAYOUT = BaseLayout(_SITES, frozenset(_MODULES | _SITES.keys()), "some-lab/Tiny-1B")


def header(data: bytes) -> None:
    """The header of a safetensors file."""
    with _meant_errors():
        _read_header(data)


def config(data: bytes) -> None:
    """An ``adapter_config.json`` with a good weights file."""
    with _meant_errors():
        plan_adapter(_PAIR, parse_config(data), LAYOUT)


def names(data: bytes) -> None:
    """A safetensors file with a good config."""
    with _meant_errors():
        plan_adapter(_read_header(data).entries, parse_config(_CONFIG), LAYOUT)


def multipart(data: bytes) -> None:
    """An upload. The first byte is the size of the pieces in which the rest arrives."""
    with _meant_errors():
        asyncio.run(_receive(data[1:], max(1, data[0]) if data else 1))


def rows(data: bytes) -> None:
    """A file of training rows."""
    path = Path(_folder(), "rows.jsonl")
    path.write_bytes(data)
    with _meant_errors():
        for row in read_dataset(path).rows:
            json.dumps(row.messages, ensure_ascii=False).encode()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (header, config, names, multipart, rows)
}


def _pair(side: str, shape: tuple[int, int], begin: int) -> TensorEntry:
    name = f"base_model.model.{_Q}.lora_{side}.weight"
    return TensorEntry(name, "F32", shape, begin, begin + 4 * shape[0] * shape[1])


_PAIR = (_pair("A", (4, 8), 0), _pair("B", (6, 4), 128))
_CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()


def _read_header(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data), header_limits(LAYOUT))


async def _receive(body: bytes, size: int) -> None:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]

    async def receive() -> Message:
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = [(b"content-type", b"multipart/form-data; boundary=" + BOUNDARY)]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    form = form_of(request, fields.FILE)
    received = sum([len(form.feed(block)) async for block in body_blocks(request)])
    form.finish()
    assert received <= len(body)
    json.dumps([form.fields, form.filename], ensure_ascii=False).encode()


@contextmanager
def _meant_errors() -> Iterator[None]:
    try:
        yield
    except ManyloraError as error:
        message = str(error)
        message.encode()
        assert 0 < len(message) <= MAX_MESSAGE, f"{len(message)} characters: {message[:500]}"


def _folder(made: list[str] = []) -> str:  # noqa: B006
    """The folder for the process, in memory if the system has such a file system."""
    if not made:
        shm = "/dev/shm"
        made.append(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
    return made[0]
