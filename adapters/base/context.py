"""How long a sequence a base is made for, as its config states it. Configs are transformers' text configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_UNLIMITED = 1 << 30

EXACT_LENGTH = "exact_length"
"""A field of some converted bases' configs: the length in tokens up to which they equal the original."""


def own_length(text_config: Any) -> int | None:
    """Tokens of the longest sequence; None if the config does not limit it.

    With YaRN and dynamic NTK scaling, a config may state the length before the scaling, as Qwen2.5's
    documentation tells. The scaled length counts then, as in vLLM.
    """
    stated: int | None = getattr(text_config, "max_position_embeddings", None)
    if stated is None:
        return None
    return max([stated, *_scaled_lengths(text_config, stated)])


def served_length(text_config: Any, limit: int | None) -> int:
    """The most tokens of a sequence under the operator's ``limit`` (None = there is none)."""
    return min(own_length(text_config) or _UNLIMITED, limit or _UNLIMITED)


def _scaled_lengths(text_config: Any, stated: int) -> Iterator[int]:
    for rope in rope_parameters(text_config):
        kind, factor = rope.get("rope_type"), rope.get("factor")
        if factor is not None and kind in ("yarn", "dynamic"):
            original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
            yield int((original or stated) * factor)


def rope_parameters(text_config: Any) -> list[Mapping[str, Any]]:
    """The rotary embeddings' parameters: one entry, one for each type of layer, or none."""
    parameters = getattr(text_config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return []
    if "rope_type" in parameters:
        return [parameters]
    return [one for one in parameters.values() if isinstance(one, Mapping)]
