"""``GET /v1/models``, and the lookup of a request's ``model`` field."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from starlette.requests import Request

from adapters.errors import AdapterNotReady, ManyloraError
from adapters.paths import served_name
from adapters.suggest import did_you_mean, near_names
from server.engine.interface import AdapterStatus, ModelInfo, Service
from server.http.context import context_of
from server.http.errors import ModelNotFound, ModelUnavailable
from server.http.json_response import JSONResponse


def base_names(base: ModelInfo) -> tuple[str, ...]:
    """The names of the base itself."""
    return base.served_names or (base.name,)


async def resolve_adapter(service: Service, model: str) -> str | None:
    """The name of the adapter that ``model`` means; None for the base.

    An unknown name is an error. It never means the base. ``base:adapter`` means the adapter, as in Ray Serve.
    The adapter folder is searched before a name counts as unknown.

    Raises:
        ModelUnavailable: the adapter failed to load, or is being unloaded.
        AdapterNotReady: the adapter's folder is not complete yet. A later request may succeed.
        ModelNotFound: no model has the name. The message lists similar names.
    """
    if model in base_names(service.base):
        return None
    wanted = [model, *_behind_base(service.base, model)]
    for name in wanted:
        if await service.find_adapter(name):
            return name
    for name in wanted:
        status = service.adapter(name)
        if status is not None and status.state == "ready":  # it was added after the first loop
            return name
        if status is not None:
            raise _unavailable(status)
    raise _not_found(service, model)


async def list_models(request: Request) -> JSONResponse:
    """The base under each of its names, and every ready adapter, on the device or not."""
    return JSONResponse({"object": "list", "data": _cards(context_of(request).service)})


async def get_model(request: Request) -> JSONResponse:
    """The model that the path names."""
    service, model = context_of(request).service, request.path_params["model"]
    name = await resolve_adapter(service, model)
    if name is None:
        return JSONResponse(_base_card(service.base, model))
    status = service.adapter(name)
    if status is None:  # it was unloaded after the lookup
        raise _not_found(service, model)
    return JSONResponse(_adapter_card(service.base, status))


def _unavailable(status: AdapterStatus) -> ManyloraError:
    if status.state == "draining":
        return ModelUnavailable(
            f"Adapter '{status.name}' is being unloaded and takes no new requests.", "model"
        )
    if status.state == "waiting":
        return AdapterNotReady(f"Adapter '{status.name}' is not served yet: {status.reason}")
    return ModelUnavailable(f"Adapter '{status.name}' could not be loaded: {status.reason}", "model")


def _behind_base(base: ModelInfo, model: str) -> list[str]:
    """``adapter`` if ``model`` is ``base:adapter``."""
    prefixes = [f"{name}:" for name in base_names(base)]
    return [model.removeprefix(prefix) for prefix in prefixes if model.startswith(prefix)]


def _not_found(service: Service, model: str) -> ModelNotFound:
    behind, names = _behind_base(service.base, model), service.adapter_names()
    wanted = behind[0] if behind else model
    near = near_names(wanted, names if behind else [*base_names(service.base), *names], cutoff=0.5)
    hint = did_you_mean(near, otherwise=". GET /v1/models lists them.")
    return ModelNotFound(f"The model {model!r} does not exist{hint}", "model")


def _cards(service: Service) -> list[dict[str, Any]]:
    base = service.base
    bases = [_base_card(base, name) for name in base_names(base)]
    return bases + [_adapter_card(base, each) for each in service.adapters() if each.state == "ready"]


def _card(name: str, created: float, base: ModelInfo) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "manylora",
        "max_model_len": base.max_model_len,
    }


def _base_card(base: ModelInfo, name: str) -> dict[str, Any]:
    own = {
        "root": base.name,
        "parent": None,
        "digest": base.digest,
        "quantization": base.quantization,
        "head_quantization": base.head_quantization,
        "default_sampling_params": base.defaults.given(),
    }
    return _card(name, base.created, base) | own


def _adapter_card(base: ModelInfo, status: AdapterStatus) -> dict[str, Any]:
    # vLLM shows the whole path as root. The folder's name alone does not reveal the server's file system.
    root = served_name(PurePath(status.path).name)
    own = {"root": root, "parent": base_names(base)[0], "digest": status.digest}
    return _card(status.name, status.created, base) | own
