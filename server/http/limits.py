"""Read JSON bodies within limits, then check them with their schema.

A body is refused early if it is too large, not JSON, not UTF-8 or has too many values. Large bodies are
parsed outside the event loop, one at a time. They are scanned in pieces, so that other threads can run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.errors import InvalidRequest
from server.http.body import MAX_NAMES, MAX_VALUES
from server.http.context import context_of
from server.http.errors import BodyNotJson, BodyTooLarge, ClientDisconnected

SMALL_BODY = 64 << 10
"""Largest body, in bytes, that is parsed on the event loop. It takes a millisecond or two."""
_PIECE = 256 << 10
_MAX_NAME, _MAX_MESSAGE = 100, 1000
"""Most characters of a client's text that an error repeats."""

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The request's JSON body as ``model``.

    Raises:
        BodyNotJson, BodyTooLarge, ClientDisconnected, QueueFull: the body could not be read.
        InvalidRequest: the body is wrong. The error names the field.
    """
    async with read_body_reserved(request, model, max_bytes) as body:
        return body


@asynccontextmanager
async def read_body_reserved(request: Request, model: type[Model], max_bytes: int) -> AsyncIterator[Model]:
    """As ``read_body``, but a large body's memory stays reserved until the block ends."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BodyNotJson("The body must be JSON; send it with the header 'Content-Type: application/json'.")
    context = context_of(request)
    with context.body_memory.reserve() as reservation:
        async with context.body_memory.receiving(reservation):
            body = await _read(request, max_bytes, lambda size: context.body_memory.resize(reservation, size))
        if len(body) <= SMALL_BODY:
            yield parse_body(body, model)
        else:
            yield await context.bodies.run(parse_body, body, model)


def parse_body(body: bytes, model: type[Model]) -> Model:
    """The JSON text as ``model``. Raises InvalidRequest for the first fault.

    Pydantic's parser limits the depth (200 levels).
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 at byte {error.start}.") from None
    if _has_many_values(body):
        raise InvalidRequest(f"The body has more than {MAX_VALUES} values; send fewer.")
    if _has_many_names(body):
        raise InvalidRequest(f"The body has more than {MAX_NAMES} names of fields; send fewer.")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


async def _read(request: Request, max_bytes: int, grown_to: Callable[[int], None]) -> bytes:
    """The whole body. If it is large, ``grown_to`` gets its size in bytes after each piece."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
            if len(body) > SMALL_BODY:
                grown_to(len(body))
    except ClientDisconnect:
        raise ClientDisconnected("The client disconnected while it was sending its request.") from None
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than {max_bytes} bytes; send fewer, or raise --max-body-bytes.")


def _has_many_values(body: bytes) -> bool:
    """Whether more than ``MAX_VALUES`` commas and opening brackets are outside strings."""
    return _has_more(body, MAX_VALUES, b",[{")


def _has_many_names(body: bytes) -> bool:
    """Whether more than ``MAX_NAMES`` colons are outside strings. A name is slower to parse than a number."""
    return _has_more(body, MAX_NAMES, b":")


def _has_more(body: bytes, most: int, marks: bytes) -> bool:
    """Whether more than ``most`` bytes outside strings are among ``marks``."""
    if _count(body, marks) <= most:  # counting those inside strings too
        return False
    # Without escapes, every second piece between quotes is outside strings.
    text, inside, count = body.replace(rb"\\", b"").replace(rb"\"", b""), False, 0
    for start in range(0, len(text), _PIECE):
        pieces = text[start : start + _PIECE].split(b'"')
        count += _count(b"".join(pieces[inside::2]), marks)
        inside ^= len(pieces) % 2 == 0
    return count > most


def _count(text: bytes, marks: bytes) -> int:
    return sum(text.count(mark) for mark in marks)


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    place = [*first["loc"], *([context["field"]] if "field" in context else [])]
    param = ".".join(str(part)[:_MAX_NAME] for part in place) or None
    message = first["msg"].removeprefix("Value error, ").replace(" after validation", "")[:_MAX_MESSAGE]
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}.")
    if kind == "unsupported":
        return InvalidRequest(f"'{param}' is not supported; {message}.", param, "unsupported_parameter")
    if kind == "missing":
        return InvalidRequest(f"'{param}' is required.", param, "missing_required_parameter")
    code = kind if kind.endswith("_above_max_length") else "invalid_value"
    return InvalidRequest(f"'{param}': {message}." if param else f"The body: {message}.", param, code)
