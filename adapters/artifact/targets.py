"""Finds the modules that a config targets, and the rank and scale of each, by PEFT's rules on names.

The rules are those of ``peft.tuners.tuners_utils.check_target_module_exists`` and
``peft.utils.other.get_pattern_key`` (0.21). The tests compare this file with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from adapters.artifact.config import ALL_LINEAR, LoraSettings
from adapters.artifact.regex import Hits, Pattern, match_names
from adapters.errors import AdapterInvalid

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """What the config says about one module."""

    rank: int
    scale: float


def targeted_modules(
    settings: LoraSettings, modules: Iterable[str], linears: Iterable[str]
) -> frozenset[str]:
    """The names in ``modules`` that get a LoRA pair. ``linears`` is what "all-linear" stands for."""
    names = tuple(sorted(modules))
    targets = settings.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = tuple(linears)
    if isinstance(targets, str):
        chosen = _full_matches(targets, names, "target_modules")
    else:
        chosen = _named(targets, names) | _in_layers(settings, _by_suffix(targets, names))
    excluded = settings.exclude_modules
    if isinstance(excluded, str):
        return frozenset(chosen - (_full_matches(excluded, names, "exclude_modules") if excluded else set()))
    return frozenset(chosen - _named(excluded, names) - _by_suffix(excluded, names))


def resolve_targets(settings: LoraSettings, modules: Iterable[str]) -> dict[str, Target]:
    """Rank and scale of each module, after ``rank_pattern`` and ``alpha_pattern``."""
    names = tuple(sorted(modules))
    ranks = _by_pattern(settings.rank_pattern, names, settings.r, "rank_pattern")
    alphas = _by_pattern(settings.alpha_pattern, names, settings.lora_alpha, "alpha_pattern")
    return {name: Target(ranks[name], settings.scale(ranks[name], alphas[name])) for name in names}


def _named(wanted: Iterable[str], names: tuple[str, ...]) -> set[str]:
    return set(names).intersection(wanted)


def _by_suffix(suffixes: Iterable[str], names: tuple[str, ...]) -> set[str]:
    wanted = frozenset(suffixes)
    return {name for name in names if any(ending in wanted for ending in _endings(name))}


def _endings(name: str) -> Iterator[str]:
    """The suffixes of a name, one after each dot. They are few, while a config may list many."""
    while name:
        name = name.partition(".")[2]
        yield name


def _full_matches(pattern: str, names: tuple[str, ...], field: str) -> set[str]:
    return set(_match((Pattern(pattern, pattern, full=True),), names, field)[0])


def _in_layers(settings: LoraSettings, names: set[str]) -> set[str]:
    """Only the names in ``layers_to_transform``. The first number after (any) layers name counts."""
    if not settings.layers_to_transform:
        return names
    patterns = [
        Pattern(layers, rf"(?:^|.*?\.){layers}\.(?P<idx>\d+)\.", full=False)
        for layers in settings.layers_pattern
    ] or [Pattern("", r".*?\.[^.]*\.(?P<idx>\d+)\.", full=False)]
    hits = _match(tuple(patterns), tuple(sorted(names)), "layers_pattern")
    layers, wanted = {name: _first(hits, name) for name in names}, frozenset(settings.layers_to_transform)
    return {name for name, layer in layers.items() if layer and int(layer) in wanted}


def _first(hits: Iterable[Hits], name: str) -> str | None:
    return next((found[name] for found in hits if name in found), None)


def _by_pattern(pattern: Mapping[str, T], names: tuple[str, ...], default: T, field: str) -> dict[str, T]:
    """The value of the first key that matches the end of the name, as in ``get_pattern_key``."""
    keys = tuple(Pattern(key, rf"(.*\.)?({key})$", full=False) for key in pattern)
    values: dict[str, T] = dict.fromkeys(names, default)
    for hits, value in reversed(list(zip(_match(keys, names, field), pattern.values(), strict=True))):
        values.update(dict.fromkeys(hits, value))
    return values


def _match(patterns: tuple[Pattern, ...], names: tuple[str, ...], field: str) -> tuple[Hits, ...]:
    try:
        return match_names(patterns, names)
    except ValueError as error:
        raise AdapterInvalid(f"{field} in adapter_config.json cannot be used: {error}.") from error
