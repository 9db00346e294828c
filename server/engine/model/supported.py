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

_CHUNKED = "chunked_attention"
"""Supported for sequences of one chunk."""


def name_of(config: Any) -> str:
    """E.g. "LlamaForCausalLM (llama)"."""
    architectures = getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")]
    return f"{architectures[0]} ({config.model_type})"


def check_config(config: Any, longest: int | None = None) -> None:
    """Raises BaseModelError, which names the architecture, if the engine cannot serve it.

    Args:
        longest: the most tokens of a sequence that the operator allows; None = as many as the base has.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    others = sorted(set(kinds) - _STEPPED)
    if others == [_CHUNKED]:
        limit = min(text.attention_chunk_size, _unscaled(text) or text.attention_chunk_size)
        check_shorter(config, longest, limit, "its layers attend in chunks")
    elif others:
        raise BaseModelError(
            f"{name_of(config)} cannot be served: it has layers of the kind {', '.join(others)}, and this "
            "server supports only layers of full and of sliding attention. Give --base another model."
        )


def check_shorter(config: Any, longest: int | None, limit: int, reason: str) -> None:
    """Raises BaseModelError with ``reason`` if sequences may be longer than ``limit`` tokens."""
    if longest is None or longest > limit:
        raise BaseModelError(
            f"{name_of(config)} cannot be served with more than {limit} tokens: {reason}. "
            f"Give --max-model-len {limit}, or --base another model."
        )


def check_temperature(config: Any, longest: int, step_tokens: int) -> None:
    """Raises BaseModelError if attention would be scaled by a token's place in the step (Llama 4).

    The scale is 1 for the first ``floor_scale`` places.
    """
    limit = _unscaled(config.get_text_config())
    if limit is None:
        return
    check_shorter(config, longest, limit, "attention beyond is scaled by the place in a step")
    if step_tokens > limit:
        raise BaseModelError(
            f"{name_of(config)} cannot be served with --max-num-batched-tokens {step_tokens}; "
            f"give {limit} at most."
        )


def _unscaled(text_config: Any) -> int | None:
    """The tokens whose attention is not scaled by their place; None = all."""
    if not getattr(text_config, "attn_temperature_tuning", False):
        return None
    scale: int = text_config.floor_scale
    return scale - 1


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
