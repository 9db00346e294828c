"""The admin routes: load, unload and list adapters. Answers have vLLM's shape, errors OpenAI's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from adapters.base_names import same_base
from server.engine.interface import AdapterStatus, ModelInfo
from server.errors import InvalidRequest
from server.http.adapters_schema import LoadAdapter, UnloadAdapter
from server.http.context import context_of
from server.http.json_response import JSONResponse
from server.http.limits import read_body
from server.http.models import base_names


async def load_adapter(request: Request) -> PlainTextResponse:
    """Register a folder inside the adapter folder under a name."""
    context = context_of(request)
    body = await read_body(request, LoadAdapter, context.config.max_body_bytes)
    if body.lora_name in base_names(context.service.base):
        raise InvalidRequest(f"'{body.lora_name}' is the base's name; choose another.", "lora_name")
    _check_base(context.service.base, body.base_model_name)
    await context.service.load_adapter(body.lora_name, body.lora_path, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(request: Request) -> PlainTextResponse:
    """Stop serving an adapter. Running requests finish."""
    context = context_of(request)
    body = await read_body(request, UnloadAdapter, context.config.max_body_bytes)
    await context.service.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def list_adapters(request: Request) -> JSONResponse:
    """Every adapter with its state. A failed one has its reason."""
    data = [_status(status) for status in context_of(request).service.adapters()]
    return JSONResponse({"object": "list", "data": data})


def _check_base(base: ModelInfo, named: str | None) -> None:
    """Refuse an adapter for another base. Names are compared as those in adapters' configs are."""
    if named is None or named in base_names(base) or same_base(named, base.name):
        return
    raise InvalidRequest(
        f"'base_model_name' is {named!r}, but this server's base is {base_names(base)[0]!r}; load the "
        "adapter where its base is served, or leave the field out.",
        "base_model_name",
    )


def _status(status: AdapterStatus) -> dict[str, Any]:
    return {"object": "adapter"} | asdict(status)
