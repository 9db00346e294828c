"""The address of an OpenAI-compatible server, and how to ask it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Path = Literal["/v1/completions", "/v1/chat/completions"]
PATHS: tuple[Path, ...] = get_args(Path)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that workloads are sent to.

    Attributes:
        base_url: scheme, host and port. No other address is contacted.
        base_model: the model name of calls without an adapter.
        fields: by adapter (None = the base), more fields of its requests, for a server that does not list
            adapters as models.
    """

    base_url: str
    base_model: str
    path: Path = "/v1/completions"
    api_key: str | None = None
    fields: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)
