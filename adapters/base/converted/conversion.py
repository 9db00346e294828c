"""What a family's module gives, and the checks of configs and tensors that the families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.errors import BaseCorrupt, BaseModelError

Converted = dict[str, Tensor]
"""The native tensors that one tensor of the files becomes, by name."""


@dataclass(frozen=True)
class Conversion:
    """How the files of one base become those of a class of transformers.

    Attributes:
        config: transformers' config of that class.
        convert: takes a tensor's name in the files and the tensor. Raises BaseCorrupt or BaseModelError.
        turn_ends: takes ``generation_config.json`` and gives the tokens that end an answer in the original's
            own chat code. The code has them, not the files.
    """

    config: Any
    convert: Callable[[str, Tensor], Converted]
    turn_ends: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda _: ()


def field(config: Mapping[str, Any], name: str) -> Any:
    """A field that the conversion needs."""
    try:
        return config[name]
    except KeyError:
        raise BaseModelError(
            f"The config.json of this {config['model_type']} model has no {name}, so it cannot be "
            "converted to a class of transformers; fetch the model again, or give --base another one."
        ) from None


def require(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a config with another value in one of these fields. Absent fields have the expected value."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise BaseModelError(
                f"This {config['model_type']} model has {name} {config[name]!r:.40} in its config.json. Only "
                f"models with {value!r} are converted to a class of transformers; give --base another model."
            )


def split(name: str, tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The rows of a fused linear (its weight or bias), apart."""
    if tensor.shape[0] != sum(sizes):
        raise BaseCorrupt(
            f"{name} has {tensor.shape[0]} rows, but config.json says {sum(sizes)}; fetch the model again."
        )
    return torch.split(tensor, list(sizes))


@dataclass(frozen=True)
class Names:
    """Renames tensors that keep their layout.

    Attributes:
        model_type: of the original, for messages.
        whole: tensors outside the layers, by their full names.
        layer: the beginning of a layer's names, before its number: ``transformer.h``.
        inner: modules or tensors in a layer, by the end of their names.
        dropped: a pattern for tensors that are computed from the config.
    """

    model_type: str
    whole: Mapping[str, str]
    layer: str
    inner: Mapping[str, str]
    dropped: str = r".*\.rotary_emb\.inv_freq"

    def layer_and_rest(self, name: str) -> tuple[str, str] | None:
        """E.g. ``transformer.h.3.ln_1.weight`` gives ``("model.layers.3", "ln_1.weight")``."""
        found = re.fullmatch(rf"{re.escape(self.layer)}\.(\d+)\.(.+)", name)
        return (f"model.layers.{found[1]}", found[2]) if found else None

    def renamed(self, name: str, tensor: Tensor) -> Converted:
        """Raises BaseModelError if the name is not known."""
        if name in self.whole:
            return {self.whole[name]: tensor}
        if place := self.layer_and_rest(name):
            layer, rest = place
            if rest in self.inner:
                return {f"{layer}.{self.inner[rest]}": tensor}
        if re.fullmatch(self.dropped, name):
            return {}
        raise BaseModelError(
            f"The tensor {name} is not one of a {self.model_type} model as it was published, so the model "
            "cannot be converted to a class of transformers; give --base another model."
        )
