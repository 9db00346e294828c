"""Checks which architectures the engine can serve. The engine's only state of past tokens is the KV cache.

Configs are transformers' configs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.errors import BaseModelError
from server.config import ConfigError

_STEPPED = frozenset({"attention", "full_attention", "sliding_attention"})
"""Supported layer types, as configs name them."""


def name_of(config: Any) -> str:
    """E.g. "LlamaForCausalLM (llama)"."""
    architectures = getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")]
    return f"{architectures[0]} ({config.model_type})"


def check_config(config: Any) -> None:
    """Raises BaseModelError, which names the architecture, if the engine cannot serve it."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    others = sorted(set(kinds) - _STEPPED)
    if others:
        raise BaseModelError(
            f"{name_of(config)} cannot be served: it has layers of the kind {', '.join(others)}, and this "
            "server supports only layers of full and of sliding attention. Give --base another model."
        )


def check_layers(config: Any, attending: Collection[int]) -> None:
    """Raises BaseModelError if some layers do not attend through the engine.

    ``attending``: the numbers of the attention calls of a pass, see ``AttentionHost``. Stacks of layers that
    run in turn may share numbers.
    """
    count: int = config.get_text_config().num_hidden_layers
    others = sorted(set(range(count)) - set(attending))
    if others and len(attending) < count:
        raise BaseModelError(
            f"{name_of(config)} cannot be served: {len(others)} of its {count} layers (the first is layer "
            f"{others[0]}) do not attend through transformers' attention interface, and this server keeps "
            "no other state of past tokens. Give --base another model."
        )


@contextmanager
def naming(config: Any, what: str) -> Iterator[None]:
    """Turn any exception of a model's code into a BaseModelError that names the architecture.

    Args:
        what: what raises; the subject of the message.
    """
    try:
        yield
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except BaseModelError as error:
        refusal = f"{name_of(config)} cannot be served: "
        raise BaseModelError(str(error) if refusal in str(error) else f"{refusal}{error}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BaseModelError(
            f"{name_of(config)} cannot be served: {what} raised {type(error).__name__} ({reason})."
        ) from error
