"""transformers' attention implementations of a model: each of its parts may have another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def implementations_of(config: Any) -> dict[str, Any]:
    """A model's attention implementations as transformers' ``set_attn_implementation`` takes them.

    The implementation of ``config`` itself is at "". Each sub-config has its own, by its field; one that has
    sub-configs too has a dict. They differ: the vision model of a base keeps its own implementation if it
    cannot have another.
    """
    found: dict[str, Any] = {"": config._attn_implementation}
    for field in config.sub_configs:
        sub = getattr(config, field, None)
        if sub is None:
            continue
        nested = implementations_of(sub)
        if len(nested) > 1:
            found[field] = nested
        elif nested[""] is not None:  # None: it is not the config of a model
            found[field] = nested[""]  # older transformers nest no dicts
    return found


def names_in(implementations: Mapping[str, Any]) -> set[str]:
    """All implementations in the result of ``implementations_of``."""
    values = implementations.values()
    nested = [names_in(value) for value in values if isinstance(value, Mapping)]
    return {value for value in values if not isinstance(value, Mapping)}.union(*nested)
