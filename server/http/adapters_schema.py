"""The bodies of the admin routes that load and unload adapters, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.http import fields
from server.http.body import Body, Name


class LoadAdapter(Body):
    """``POST /v1/load_lora_adapter``."""

    rules = fields.LOAD

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    base_model_name: Name | None = None
    """The base that the client expects. vLLM ignores it. Here, another base than ours is refused."""


class UnloadAdapter(Body):
    """``POST /v1/unload_lora_adapter``."""

    rules = fields.UNLOAD

    lora_name: Name
