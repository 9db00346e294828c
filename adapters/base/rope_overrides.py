"""Replaces the parameters of rotary embeddings, in the form of transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from adapters.errors import BaseModelError
from adapters.suggest import did_you_mean, near_names

_KEPT = ("rope_theta", "partial_rotary_factor")
"""Parameters that hold for all types, so that another type keeps them."""

_ORIGINAL = "original_max_position_embeddings"
_LISTS = ("short_factor", "long_factor", "mrope_section")
_FROM_ONE = ("factor", _ORIGINAL)
_WITH_ORIGINAL = ("yarn", "longrope", "llama3")


def refuse(place: str, value: Any, expected: str) -> NoReturn:
    """Raises BaseModelError: the value at ``place`` is not as expected."""
    raise BaseModelError(f"--hf-overrides: {place} is {value!r:.60}, and must be {expected}.")


def overridden_rope(old: Mapping[str, Any], new: Any, length: int | None, place: str) -> dict[str, Any]:
    """The parameters ``old`` with those of ``new``.

    A new ``rope_type`` replaces all parameters except theta and the rotary share. Without one, single
    parameters change.

    Args:
        old: one object of parameters, or one for each type of layer.
        new: of the same form.
        length: the tokens that the base is made for, before any override.
        place: the field's name, for messages.

    Raises:
        BaseModelError: a name or a value is wrong.
    """
    if not isinstance(new, Mapping):
        refuse(place, new, 'an object such as {"rope_type": "yarn", "factor": 4.0}')
    if any(isinstance(value, Mapping) for value in old.values()):
        return _by_layer_type(old, new, length, place)
    given = {"rope_type" if key == "type" else key: value for key, value in new.items()}
    for key, value in given.items():
        _check(key, value, f"{place}.{key}", {*old, *RopeParameters.__annotations__})
    if "rope_type" not in given:
        return {**old, **given}
    if given["rope_type"] in _WITH_ORIGINAL and length is not None:
        given.setdefault(_ORIGINAL, old.get(_ORIGINAL, length))
    _check_factor(given, place)
    return {key: old[key] for key in _KEPT if key in old} | given


def _by_layer_type(
    old: Mapping[str, Any], new: Mapping[str, Any], length: int | None, place: str
) -> dict[str, Any]:
    kinds = [key for key, value in old.items() if isinstance(value, Mapping)]
    if other := sorted(new.keys() - kinds):
        raise BaseModelError(
            f"--hf-overrides: {place}.{other[0]}: this base has parameters for each type of layer; give "
            f'{{"rope_parameters": {{"{kinds[0]}": {{…}}}}}} with any of {", ".join(kinds)}.'
        )
    changed = {kind: overridden_rope(old[kind], new[kind], length, f"{place}.{kind}") for kind in new}
    return {**old, **changed}


def _check(key: str, value: Any, place: str, known: set[str]) -> None:
    if key not in known:
        raise BaseModelError(
            f"--hf-overrides: {place} is not a parameter of rotary embeddings"
            f"{did_you_mean(near_names(key, known, count=1))}"
        )
    if key == "rope_type":
        kinds = ("default", *ROPE_INIT_FUNCTIONS)
        if value not in kinds:
            refuse(place, value, f"one of {', '.join(kinds)}")
    elif key in _LISTS:
        if not isinstance(value, list) or not value or not all(map(_is_number, value)):
            refuse(place, value, "a list of numbers")
    elif key == "truncate":
        if not isinstance(value, bool):
            refuse(place, value, "true or false")
    elif not _is_number(value) or value < (1 if key in _FROM_ONE else 0):
        refuse(place, value, "a number, at least 1" if key in _FROM_ONE else "a number over 0")


def _check_factor(given: Mapping[str, Any], place: str) -> None:
    if given["rope_type"] not in ("default", "longrope", "proportional") and "factor" not in given:
        raise BaseModelError(f"--hf-overrides: {place} has no factor; {given['rope_type']} needs one.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
