"""``adapter_config.json`` → ``LoraSettings``: the fields that decide what an adapter computes.

Each field means what it means in PEFT (``peft.LoraConfig``). ``fields.py`` refuses what cannot be served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapters.artifact.fields import check_fields
from adapters.artifact.files import CONFIG_FILE, parse_object
from adapters.errors import AdapterInvalid

MAX_CONFIG_BYTES = 2**20
MAX_LABEL_LENGTH = 500
"""Characters of a text that is only listed. Longer texts are cut."""
ALL_LINEAR = "all-linear"

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The config's fields. To select modules, a string is a regular expression, a tuple has names and
    suffixes.

    ``warnings`` are whole sentences about fields that do not change the result.
    """

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    warnings: tuple[str, ...] = ()

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of ``lora_B(lora_A(x))``."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes) -> LoraSettings:
    """Raises AdapterInvalid (a field is malformed) or AdapterUnsupported (it cannot be served exactly)."""
    config = parse_object(data, CONFIG_FILE)
    warnings = check_fields(config)
    _check_together(config)
    return LoraSettings(
        r=_optional(config, "r", _rank, 8),
        lora_alpha=_optional(config, "lora_alpha", _number, 8.0),
        target_modules=_required(config, "target_modules", _text_or_names),
        use_rslora=_optional(config, "use_rslora", _flag, False),
        rank_pattern=_optional(config, "rank_pattern", _mapping_of(_rank), {}),
        alpha_pattern=_optional(config, "alpha_pattern", _mapping_of(_number), {}),
        exclude_modules=_optional(config, "exclude_modules", _text_or_names, ()),
        layers_to_transform=_optional(config, "layers_to_transform", _layers, ()),
        layers_pattern=_optional(config, "layers_pattern", _names, ()),
        base_model=_optional(config, "base_model_name_or_path", _label, None),
        use_dora=_optional(config, "use_dora", _flag, False),
        lora_bias=_optional(config, "lora_bias", _flag, False),
        bias=_optional(config, "bias", _bias, "none"),
        modules_to_save=_optional(config, "modules_to_save", _names, ()),
        ensure_weight_tying=_optional(config, "ensure_weight_tying", _flag, False),
        warnings=warnings,
    )


def _check_together(config: Mapping[str, Any]) -> None:
    """``LoraConfig.__post_init__`` refuses the same combinations."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if isinstance(config.get("target_modules"), str) and (layers is not None or pattern is not None):
        raise AdapterInvalid(
            "layers_to_transform and layers_pattern need target_modules to be a list of names, not a pattern."
        )
    if pattern and layers is None:
        raise AdapterInvalid("layers_pattern needs layers_to_transform; set both or neither.")
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterInvalid("use_dora and lora_bias cannot both be true; train with one of them.")


class _Malformed(Exception):
    """Says what a field must be; ``_read`` adds which field."""


def _read(config: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
    try:
        return read(config[key])
    except _Malformed as error:
        raise AdapterInvalid(f"{key} in {CONFIG_FILE} must be {error}, not {config[key]!r:.200}.") from None


def _required(config: Mapping[str, Any], key: str, read: Callable[[Any], T]) -> T:
    if config.get(key) is None:
        raise AdapterInvalid(f"{CONFIG_FILE} has no {key}; PEFT always writes it.")
    return _read(config, key, read)


def _optional(config: Mapping[str, Any], key: str, read: Callable[[Any], T], default: D) -> T | D:
    return default if config.get(key) is None else _read(config, key, read)


def _rank(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise _Malformed("a positive integer")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Malformed("a finite number")
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _Malformed("true or false")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Malformed("a string")
    return value


def _label(value: Any) -> str:
    return _text(value)[:MAX_LABEL_LENGTH]


def _names(value: Any) -> tuple[str, ...]:
    names = [part for part in [value] if part] if type(value) is str else value
    if type(names) is not list or not all(type(name) is str for name in names):
        raise _Malformed("a string or a list of strings")
    return tuple(names)


def _text_or_names(value: Any) -> str | tuple[str, ...]:
    return value if type(value) is str else _names(value)


def _bias(value: Any) -> str:
    if value not in ("none", "all", "lora_only"):
        raise _Malformed("'none', 'all' or 'lora_only'")
    return str(value)


def _layers(value: Any) -> tuple[int, ...]:
    layers = [value] if type(value) is int else value
    if type(layers) is not list or not all(type(layer) is int for layer in layers):
        raise _Malformed("an integer or a list of integers")
    return tuple(layers)


def _mapping_of(read: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def mapping(value: Any) -> dict[str, T]:
        if type(value) is not dict:
            raise _Malformed("an object")
        return {key: read(item) for key, item in value.items()}

    return mapping
