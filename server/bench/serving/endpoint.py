"""Where a workload goes: an OpenAI-compatible server's address, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Path = Literal["/v1/completions", "/v1/chat/completions"]
PATHS: tuple[Path, ...] = get_args(Path)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a workload goes.

    Attributes:
        base_url: scheme, host and port; the operator named it, and nothing else is ever contacted.
        base_model: the model name of calls without an adapter.
        fields: adapter, or None for the base → fields of its requests, for a server that does not know
            adapters as models.
    """

    base_url: str
    base_model: str
    path: Path = "/v1/completions"
    api_key: str | None = None
    fields: Mapping[str | None, Mapping[str, Any]] = field(default_factory=dict)
