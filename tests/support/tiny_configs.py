"""A tiny config of every causal LM class of transformers, made from the class's own defaults.

Sizes shrink by the field's name (``tiny_sizes``). Lists that have one entry for each layer keep one layer of
each kind, so that every kind of layer is present. ``tiny_exceptions`` holds more fields for single classes.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.tiny_exceptions import FIELDS
from tests.support.tiny_sizes import HEADS, LAYER_COUNTS, LAYERS, SIZES, UNSET, VOCABULARY

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Every model type of which the installed transformers has a causal LM."""

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str, **fields: Any) -> Any:
    """A tiny config of a model type. ``fields`` replace the usual ones.

    Raises the error of transformers if it refuses the config.
    """
    with quiet():
        return _shrunk(CONFIG_MAPPING[model_type](), {**FIELDS.get(model_type, {}), **fields})


def _shrunk(config: Any, others: Mapping[str, Any]) -> Any:
    """A config of the same class with small sizes. ``others`` replace fields; a dict is for a sub-config."""
    subs = {
        name: sub for name in config.sub_configs if hasattr(sub := getattr(config, name, None), "to_dict")
    }
    plain = {name: value for name, value in config.to_dict().items() if name not in subs}
    fields = {name: small for name, value in plain.items() if (small := _small(name, value)) is not None}
    fields |= _one_layer_of_each_kind(plain)
    if "kv_lora_rank" in fields:  # latent attention has no groups of query heads
        fields["num_key_value_heads"] = HEADS
    fields |= {name: value for name, value in others.items() if name not in subs}
    small_subs = {name: _shrunk(sub, others.get(name, {})).to_dict() for name, sub in subs.items()}
    return type(config)(**fields, **small_subs)


def _small(name: str, value: Any) -> Any:
    """A field's small value; None = it keeps its default."""
    if name == "is_decoder":
        return True
    if name in _TOKENS or (value is None and name in UNSET):
        return {**SIZES, **_TOKENS}[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name.endswith(("_token_id", "_token_index")):
        return min(value, VOCABULARY - 12 + len(name) % 11)
    return min(value, SIZES[name]) if name in SIZES else None


def _one_layer_of_each_kind(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The lists with one entry for each layer, cut to one layer of each kind, and the number of layers."""
    count = next((name for name in LAYER_COUNTS if isinstance(plain.get(name), int)), None)
    if count is None:
        return {}
    layers = range(plain[count])
    lists = {
        name: value
        for name, value in plain.items()
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(layers)
    }
    numbers = [name for name, value in lists.items() if list(value) == list(layers)]  # they list layers
    kinds = {name: value for name, value in lists.items() if name not in numbers}
    first: dict[str, int] = {}
    for layer in layers:
        first.setdefault(repr([value[layer] for value in kinds.values()]), layer)
    kept = sorted(first.values()) if len(first) >= LAYERS else list(layers)[:LAYERS]
    cut = {name: [_small_entry(name, value[layer]) for layer in kept] for name, value in kinds.items()}
    return {count: len(kept), **cut, **{name: list(range(len(kept))) for name in numbers}}


def _small_entry(name: str, value: Any) -> Any:
    small = _small(name.removesuffix("_per_layer"), value)
    return value if small is None else small


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' warnings about invented configs."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
