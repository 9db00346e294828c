"""``GET /openapi.json``: the API's description, made from the routes, the models and the table of errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.routing import Route

from server.finetune.jobs.files import TRAINING
from server.http import fields, files, fine_tuning
from server.http.adapters_schema import LoadAdapter, UnloadAdapter
from server.http.body import Body
from server.http.context import context_of
from server.http.errors import INTERNAL, SHAPES
from server.http.fine_tuning_schema import MAX_TAGS, CreateJob
from server.http.json_response import JSONResponse
from server.http.query import Parameters
from server.http.schema import ChatBody, CompletionBody
from server.http.urls import CODES
from server.version import VERSION

Schema = dict[str, Any]

BODIES: Mapping[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/fine_tuning/jobs": CreateJob,
    "/v1/load_lora_adapter": LoadAdapter,
    "/v1/unload_lora_adapter": UnloadAdapter,
}
"""The models of JSON bodies, by path. ``POST /v1/files`` takes a form."""
QUERIES: Mapping[str, Parameters] = {
    "/v1/files": files.LIST,
    "/v1/fine_tuning/jobs": fine_tuning.PAGE,
    "/v1/fine_tuning/jobs/{job}/events": fine_tuning.EVENTS,
    "/v1/fine_tuning/jobs/{job}/checkpoints": fine_tuning.CHECKPOINT_PAGE,
}
"""The query parameters of ``GET`` routes, by path."""
_TYPES: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("application/json", "text/event-stream"),
    "/v1/completions": ("application/json", "text/event-stream"),
    "/v1/fine_tuning/jobs/{job}/events": ("application/json", "text/event-stream"),
    "/v1/files/{file}/content": ("application/octet-stream",),
    "/v1/load_lora_adapter": ("text/plain",),
    "/v1/unload_lora_adapter": ("text/plain",),
    "/metrics": ("text/plain",),
}
"""The media types of an answer, if it is not only JSON."""
_PROBES = ("/health", "/ready")
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_TAGS: Schema = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "maxProperties": MAX_TAGS},
}


async def openapi(request: Request) -> JSONResponse:
    """The description of this API, in OpenAPI 3.1."""
    routes = [each for each in request.app.routes if isinstance(each, Route)]
    return JSONResponse(await context_of(request).bodies.run(document, routes))


def document(routes: list[Route]) -> Schema:
    """The OpenAPI document of an app with these routes."""
    paths: dict[str, Schema] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in (route.methods or set()) - {"HEAD"}:
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "manylora", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": _schemas() | {"Error": _ERROR},
            "responses": dict(_errors()),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


@cache
def _schemas() -> Schema:
    """The schemas of all bodies. They take some tenths of a second to make, so this is done once."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    definitions: Schema = schemas["$defs"]
    return definitions


def _operation(method: str, path: str, route: Route) -> Schema:
    operation: Schema = {
        "summary": " ".join((route.endpoint.__doc__ or "").split()),
        "operationId": route.name,
        "security": [{}] if path in _PROBES else [{"key": []}, {}],
        "responses": _responses(path),
    }
    if parameters := _parameters(method, path):
        operation["parameters"] = parameters
    if method == "POST" and (content := _content(path)):
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameters(method: str, path: str) -> list[Schema]:
    inside = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    if method != "GET":
        return inside
    query = [
        {"name": name, "in": "query", "schema": each.schema} for name, each in QUERIES.get(path, {}).items()
    ]
    return [*inside, *query, *([_TAGS] if path == "/v1/fine_tuning/jobs" else [])]


def _content(path: str) -> Schema:
    if path == "/v1/files":
        return {"multipart/form-data": {"schema": _form()}}
    if path not in BODIES:
        return {}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}}}


def _form() -> Schema:
    served = [name for name, rule in fields.FILE.items() if rule.kind == "served"]
    kinds: Schema = {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": [TRAINING]}}
    return {
        "type": "object",
        "required": served,
        "properties": {name: kinds[name] for name in served},
        "additionalProperties": False,
    }


def _responses(path: str) -> Schema:
    types = _TYPES.get(path, ("application/json",))
    success: Schema = {each: {} for each in types}
    if "application/json" in success:
        success["application/json"] = {"schema": {"type": "object"}}
    responses: Schema = {"200": {"description": "Success.", "content": success}}
    errors: Schema = {status: {"$ref": f"#/components/responses/{status}"} for status, _ in _errors()}
    if path in _PROBES:
        state = {"application/json": {"schema": {"type": "object", "required": ["status"]}}}
        errors["503"] = {"description": "The server does not take requests.", "content": state}
    return responses | errors


def _errors() -> Iterator[tuple[str, Schema]]:
    """A response for each status of the table of errors, with its codes."""
    rows = [(shape.status, shape.code) for shape in (*SHAPES.values(), INTERNAL)] + list(CODES.items())
    for status in sorted({status for status, _ in rows} - {499}):
        codes = sorted({code or "null" for each, code in rows if each == status})
        yield (
            str(status),
            {
                "description": f"Codes: {', '.join(codes)}.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        )
