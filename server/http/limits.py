"""Bodies: refused early if too large, not JSON, not UTF-8 or too deep; then checked against their schema."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.errors import InvalidRequest
from server.http.errors import BodyNotJson, BodyTooLarge, ClientDisconnected

MAX_DEPTH = 32

Model = TypeVar("Model", bound=BaseModel)

# Possessive, and content with a missing last quote: linear in the body, whatever it holds.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """The request's JSON body as ``model``. Raises what refuses it; ``InvalidRequest`` names the field."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BodyNotJson("The body must be JSON: send the header 'Content-Type: application/json'.")
    body = await _read(request, max_bytes)
    _check_text(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect:
        raise ClientDisconnected("The client went away while sending its request.") from None
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has more than {max_bytes} bytes; send less, or raise --max-body-bytes.")


def _check_text(body: bytes) -> None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 at byte {error.start}.") from None
    if not _is_shallow(body):
        raise InvalidRequest(f"The body nests brackets deeper than {MAX_DEPTH}, or does not close them.")


def _is_shallow(body: bytes) -> bool:
    """Whether brackets outside strings are balanced within ``MAX_DEPTH``: each round strips the innermost."""
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return not brackets


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}.")
    if kind == "extra_forbidden":
        return InvalidRequest(f"'{param}' is not supported; leave it out.", param, "unsupported_parameter")
    if kind == "missing":
        return InvalidRequest(f"'{param}' is required.", param, "missing_required_parameter")
    return InvalidRequest(f"'{param}': {message}." if param else f"{message}.", param, "invalid_value")
