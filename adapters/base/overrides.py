"""Replaces fields of a base's config, as vLLM's ``--hf-overrides`` does.

Only fields that exist can be replaced, and the weights must still fit. Configs are transformers' configs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from adapters.base.context import EXACT_LENGTH, own_length
from adapters.base.quiet import quiet_libraries
from adapters.base.rope_overrides import overridden_rope, refuse
from adapters.errors import BaseModelError
from adapters.suggest import did_you_mean, near_names

_ROPE = ("rope_parameters", "rope_scaling")
"""transformers 5 and earlier releases name the parameters of rotary embeddings so."""

_FIXED = frozenset(
    {
        "architectures",
        "auto_map",
        "converted_from",
        EXACT_LENGTH,
        "dtype",
        "model_type",
        "quantization_config",
        "torch_dtype",
    }
    | {"tie_word_embeddings", "transformers_version"}
)
"""They tell what the files contain. Overrides cannot change that."""

_BEFORE_LAYER_TYPES = frozenset({"max_window_layers", "sliding_window_pattern", "use_sliding_window"})
"""transformers makes ``layer_types`` from them, if a config has none."""

_LENGTH = "max_position_embeddings"


def apply_overrides(config: Any, hf_overrides: str) -> Any:
    """A new config of the same class.

    Args:
        hf_overrides: a JSON object. An object in it changes single fields of a config inside the config.

    Raises:
        BaseModelError: a field does not exist, has a wrong value, or would change the weights.
    """
    fields = json.loads(hf_overrides)
    values = _merged(config, fields, "")
    try:
        changed = type(config).from_dict(values)
    except Exception as error:  # each config class checks its fields in its own way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BaseModelError(
            f"--hf-overrides: {type(config).__name__} does not accept the values "
            f"({lines[-1] if lines else type(error).__name__}); correct them."
        ) from error
    _check_taken(changed, fields, "")
    _check_length(changed)
    _check_weights(config, changed)
    return changed


def _merged(config: Any, fields: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The values of ``config`` with ``fields``. ``path`` is the place of ``config``, for messages."""
    values: dict[str, Any] = config.to_dict()
    for key, value in fields.items():
        if key in _ROPE:
            _merge_rope(config, values, value, fields, path + key)
        elif key == "rope_theta" and key not in values:
            _merge_rope(config, values, {key: value}, fields, path + key)
        else:
            name = config.attribute_map.get(key, key)
            _check_name(config, values, name, path + key)
            inner = getattr(config, name)
            if isinstance(inner, PreTrainedConfig):
                if not isinstance(value, Mapping):
                    refuse(path + key, value, "an object with fields of that config")
                values[name] = _merged(inner, value, f"{path}{key}.")
            else:
                _check_kind(path + key, inner, value)
                values[name] = value
    return values


def _merge_rope(
    config: Any, values: dict[str, Any], rope: Any, fields: Mapping[str, Any], place: str
) -> None:
    old = values.get("rope_parameters")
    if not old:
        raise BaseModelError(f"--hf-overrides: {place}: {_in(config, 'rope_parameters')}")
    length: int | None = values.get(_LENGTH) if _LENGTH in fields else getattr(config, _LENGTH, None)
    before: int | None = getattr(config, _LENGTH, None)
    values["rope_parameters"] = new = overridden_rope(old, rope, before, place)
    values.pop("rope_scaling", None)
    if "original_max_position_embeddings" in values and "original_max_position_embeddings" in new:
        values["original_max_position_embeddings"] = new["original_max_position_embeddings"]
    if rope.get("rope_type", rope.get("type")) == "linear" and _LENGTH not in fields and length:
        values[_LENGTH] = int(length * new["factor"])  # as vLLM does


def _check_name(config: Any, values: Mapping[str, Any], name: str, place: str) -> None:
    if name in _FIXED or name.startswith("_"):
        raise BaseModelError(
            f"--hf-overrides: {place} tells what the base's files contain and cannot be replaced; "
            "leave it out."
        )
    if name not in values:
        raise BaseModelError(f"--hf-overrides: {place}: {_in(config, name)}")


def _in(config: Any, name: str) -> str:
    """Says that ``config`` has no such field, and where there is one."""
    missing = f"{type(config).__name__} has no field {name!r}"
    for key, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and name in inner.to_dict():
            return f'{missing}; give {{"{key}": {{"{name}": …}}}}.'
    return missing + did_you_mean(near_names(name, config.to_dict(), count=1))


def _check_kind(place: str, old: Any, new: Any) -> None:
    """The new value must be a number, true or false, a text, a list or an object, as the old one."""
    if isinstance(old, bool) and not isinstance(new, bool):
        refuse(place, new, "true or false")
    if isinstance(old, int | float) and not isinstance(old, bool) and new is not None:
        if isinstance(new, bool) or not isinstance(new, int | float):
            refuse(place, new, "a number")
        if old > 0 and (new < 0 or (new == 0 and place.endswith(_LENGTH))):
            refuse(place, new, "over 0")
    for kind, expected in ((str, "a text"), (list, "a list"), (dict, "an object")):
        if isinstance(old, kind) and new is not None and not isinstance(new, kind):
            refuse(place, new, expected)


def _check_taken(changed: Any, fields: Mapping[str, Any], path: str) -> None:
    """Refuse fields that the config's class drops, or that other fields make useless."""
    values = changed.to_dict()
    for key, value in fields.items():
        name = changed.attribute_map.get(key, key)
        inner = getattr(changed, name, None)
        if isinstance(inner, PreTrainedConfig):
            _check_taken(inner, value, f"{path}{key}.")
        elif name in values and name not in _ROPE and values[name] != value:
            raise BaseModelError(
                f"--hf-overrides: {type(changed).__name__} sets {path}{key} to {values[name]!r:.60} by other "
                "fields; give those too, or leave it out."
            )
        elif name in _BEFORE_LAYER_TYPES and values.get("layer_types") and "layer_types" not in fields:
            raise BaseModelError(
                f"--hf-overrides: {path}{key} has no effect, because the config names the type of each "
                "layer; give layer_types too."
            )


def _check_length(changed: Any) -> None:
    limit, length = getattr(changed, EXACT_LENGTH, None), own_length(changed.get_text_config())
    if limit is not None and (length is None or length > limit):
        raise BaseModelError(
            f"--hf-overrides: this base cannot be served with more than {limit} tokens: beyond, the original "
            "scales attention by a token's position (use_logn_attn, use_dynamic_ntk). Leave the length."
        )


def _check_weights(config: Any, changed: Any) -> None:
    before, after = _shapes(config, ""), _shapes(changed, "--hf-overrides: ")
    if before == after:
        return
    name = next(name for name in (*before, *after) if before.get(name) != after.get(name))
    raise BaseModelError(
        f"--hf-overrides: the base's weights would not fit: {name} would be {_shown(after.get(name))}, "
        f"and it is {_shown(before.get(name))}. "
        "Leave out fields that change the number or the sizes of weights."
    )


def _shapes(config: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"), quiet_libraries(progress=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    except Exception as error:
        raise BaseModelError(
            f"{prefix}no model can be made with this config: {type(error).__name__} ({error})."
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
