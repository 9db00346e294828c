"""The families that are converted, by ``model_type``, and what their folders must contain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from adapters.base.converted import baichuan, chatglm, qwen
from adapters.base.converted.conversion import Conversion
from adapters.errors import BaseCorrupt, BaseModelError

FROM = "converted_from"
"""The field of a native config that says the original's ``model_type``."""

_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Conversion]] = {
    "baichuan": baichuan.conversion,
    "chatglm": chatglm.conversion,
    "qwen": qwen.conversion,
}
_ORIGINAL_NAMES = {
    "baichuan": baichuan.ORIGINAL_NAMES,
    "chatglm": chatglm.ORIGINAL_NAMES,
    "qwen": qwen.ORIGINAL_NAMES,
}


def conversion_of(folder: Path, config: Mapping[str, Any]) -> Conversion | None:
    """How to convert a folder; None: transformers has its class.

    Args:
        config: its ``config.json``.

    Raises:
        BaseCorrupt: the config has wrong values.
        BaseModelError: a variant that is not converted, or a folder without a fast tokenizer.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        return None
    try:
        conversion = _FAMILIES[family](config)
    except BaseModelError:
        raise
    except Exception as error:  # of fields that are not numbers, or of transformers' checks
        raise BaseCorrupt(
            f"{folder / 'config.json'} cannot be read as the config of a {family} model ({error!r}); "
            "fetch it again."
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise BaseModelError(
            f"{folder} has no tokenizer.json. The tokenizer that {family} models come with needs code from "
            "their repository, and this server never runs such code. Put a tokenizer.json (tokenizers) with "
            "the same vocabulary and token ids into the folder."
        )
    setattr(conversion.config, FROM, family)
    return conversion


def original_names(config: Any) -> Mapping[str, str]:
    """For each linear that has another name in the original: its names in the native class. Usually empty."""
    return MappingProxyType(_ORIGINAL_NAMES.get(getattr(config, FROM, None) or "", {}))
