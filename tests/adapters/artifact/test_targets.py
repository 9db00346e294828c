"""Target matching, compared with PEFT's own functions on random configs."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.artifact import regex
from adapters.artifact.config import LoraSettings
from adapters.artifact.header import TensorEntry
from adapters.artifact.plan import plan_adapter
from adapters.artifact.targets import resolve_targets, targeted_modules
from adapters.errors import AdapterInvalid
from adapters.sites import BaseLayout, Site

MODULES = [
    "lm_head",
    "model.embed_tokens",
    "q_proj",
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 10) for name in ("q_proj", "kq_proj")),
    *(f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (0, 1)),
    "model.vision.blocks.1.attn.q_proj",
]
NAMES = st.sampled_from(
    [
        "q_proj",
        "proj",
        "kq_proj",
        "up_proj",
        "self_attn.q_proj",
        "experts.1.up_proj",
        "1.up_proj",
        "lm_head",
        *MODULES[4:7],
    ]
)
# Without operators that backtrack, so that no example needs a child process.
REGEXES = st.sampled_from(
    [r"q_proj", r"model\.layers\.\d\.self_attn\.q_proj", r"model.layers.1.self_attn.k?q_proj"]
)
CHOICES = st.one_of(st.lists(NAMES, min_size=1, max_size=4), REGEXES)
LAYERS = st.one_of(st.none(), st.integers(0, 2), st.lists(st.sampled_from([0, 1, 10]), max_size=2))
PATTERNS = st.sampled_from([None, "layers", ["layers", "blocks"], ["experts"], "", []])


def _settings(config: LoraConfig) -> LoraSettings:
    def plain(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value or ())

    layers = config.layers_to_transform
    return LoraSettings(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=plain(config.target_modules),
        exclude_modules=plain(config.exclude_modules),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layers_pattern=tuple(
            [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ()
        )
        if config.layers_pattern
        else (),
    )


def _by_peft(config: LoraConfig) -> set[str]:
    hits = {name: check_target_module_exists(config, name) for name in MODULES}
    return {name for name, hit in hits.items() if hit and not isinstance(hit, _ExcludedModule)}


@settings(deadline=None, max_examples=150)
@given(targets=CHOICES, excluded=st.one_of(st.none(), CHOICES), layers=LAYERS, pattern=PATTERNS)
def test_same_modules_as_peft(targets: Any, excluded: Any, layers: Any, pattern: Any) -> None:
    if isinstance(targets, str):
        layers = pattern = None
    if layers is None:
        pattern = None
    fields = {"target_modules": targets, "exclude_modules": excluded}
    config = LoraConfig(**fields, layers_to_transform=layers, layers_pattern=pattern)
    assert targeted_modules(_settings(config), MODULES, ()) == _by_peft(config)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.one_of(NAMES, st.just("^model.layers.1"), st.just("mlp.experts.1.up_proj")), st.integers(1, 9)
    )
)
def test_same_rank_as_peft(ranks: dict[str, int]) -> None:
    resolved = resolve_targets(
        LoraSettings(r=99, lora_alpha=99, target_modules=(), rank_pattern=ranks), MODULES
    )
    expected = {name: ranks.get(get_pattern_key(list(ranks), name), 99) for name in MODULES}
    assert {name: target.rank for name, target in resolved.items()} == expected


def test_all_linear_is_every_linear_but_the_excluded() -> None:
    chosen = LoraSettings(r=1, lora_alpha=1, target_modules="All-Linear", exclude_modules=("up_proj",))
    assert targeted_modules(chosen, MODULES, MODULES[3:9] + MODULES[-5:-1]) == set(MODULES[3:9])


def test_scale_is_alpha_over_rank_or_over_its_root() -> None:
    plain = LoraSettings(r=16, lora_alpha=8, target_modules=(), alpha_pattern={"q_proj": 4})
    stable = LoraSettings(r=16, lora_alpha=8, target_modules=(), use_rslora=True)
    assert resolve_targets(plain, ["a.q_proj", "v"])["a.q_proj"].scale == 0.25
    assert resolve_targets(plain, ["a.q_proj", "v"])["v"].scale == 0.5
    assert resolve_targets(stable, ["v"])["v"].scale == 2.0


def test_a_pattern_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.artifact.regex.TIMEOUT", 0.3)
    evil = LoraSettings(r=1, lora_alpha=1, target_modules=r"(([a-z._0-9])+)+!")
    before = time.monotonic()
    with pytest.raises(
        AdapterInvalid, match=r"target_modules in adapter_config.json .* take longer than 0.3 seconds"
    ):
        targeted_modules(evil, MODULES, ())
    assert time.monotonic() - before < 30


def test_very_many_plain_patterns_are_matched_in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "_hits", None)  # in this interpreter
    plain = tuple(regex.Pattern(f"m{i}", f"m{i}", full=True) for i in range(1000))
    names = tuple(f"m{i}" for i in range(0, 3000, 2))
    assert regex.match_names(plain, names) == tuple(
        {f"m{i}": None} if i % 2 == 0 else {} for i in range(1000)
    )


def test_all_patterns_of_a_config_share_one_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    clock = itertools.count(0.0, 0.75)

    def asked(patterns: Sequence[regex.Pattern], _names: Sequence[str], seconds: float) -> list[regex.Hits]:
        given.append(seconds)
        if seconds < 0.75:
            raise subprocess.TimeoutExpired("child", seconds)
        return [{} for _ in patterns]

    monkeypatch.setattr(regex, "_asked", asked)
    monkeypatch.setattr(regex, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with regex.config_budget():
        for name in ("a+", "b+"):
            regex.match_names((regex.Pattern(name, name, full=True),), ("config_budget",))
        with pytest.raises(ValueError, match="patterns of the config take longer than 2 seconds"):
            regex.match_names((regex.Pattern("c+", "c+", full=True),), ("config_budget",))
    assert given == [2.0, 1.25, 0.5]


@pytest.mark.parametrize("pattern", ["(", "(?P<a>x)(?P<a>y)*", "x" * 10 + "**"])
def test_an_invalid_pattern_is_named(pattern: str) -> None:
    broken = LoraSettings(r=1, lora_alpha=1, target_modules=(), rank_pattern={pattern: 2})
    with pytest.raises(
        AdapterInvalid, match=r"rank_pattern in adapter_config.json .* is not a regular expression"
    ):
        resolve_targets(broken, MODULES)


def test_too_many_patterns_are_refused() -> None:
    many = LoraSettings(r=1, lora_alpha=1, target_modules=(), rank_pattern={f"m{i}": 1 for i in range(5000)})
    with pytest.raises(AdapterInvalid, match="there are 5000 patterns; at most 4096"):
        resolve_targets(many, MODULES)


def test_planning_time_is_linear_in_modules_and_names() -> None:
    sites = {name: Site(name, 8, 8) for i in range(3000) if (name := f"model.layers.{i}.mlp.up_proj")}
    layout = BaseLayout(sites, frozenset(sites), "many")
    entries = [
        TensorEntry(f"base_model.model.{name}.lora_{side}.weight", "F32", shape, 0, 0)
        for name in sites
        for side, shape in (("A", (4, 8)), ("B", (8, 4)))
    ]
    many = tuple(f"no_module_{i}" for i in range(10_000))
    lists: dict[str, Any] = {
        "exclude_modules": many,
        "modules_to_save": many,
        "layers_to_transform": tuple(range(10_000)),
    }
    began = time.monotonic()
    for targets in ("all-linear", (*sites, *many)):
        chosen = LoraSettings(r=4, lora_alpha=4, target_modules=targets, **lists)
        assert len(plan_adapter(entries, chosen, layout).sites) == 3000
    assert time.monotonic() - began < 20
