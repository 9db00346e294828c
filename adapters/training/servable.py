"""Prepares a run's base, and checks whether a recipe's adapter can be trained and then served.

The checks read no weights. The code that reads adapters for serving plans the adapter, from the names and
shapes that its file will have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adapters.artifact.adapter import Limits
from adapters.artifact.config import LoraSettings
from adapters.artifact.header import TensorEntry
from adapters.artifact.plan import check_limits, plan_adapter
from adapters.base import PreparedBase, prepare_base
from adapters.errors import AdapterError, RecipeInvalid
from adapters.sites import BaseLayout, Site
from adapters.training.recipe import ADALORA_SURPLUS, ALL_LINEAR, TrainConfig

_SERVED_BYTES = 2
"""Bytes of a bf16 value."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The limits of the server that will serve the adapter.

    Attributes:
        limits: the limits of one adapter's rank and bytes.
        extra_bytes: the limit of an adapter's extras.
        is_asked: whether the evaluation asks a held-out row with that reference.
        max_model_len: the server's limit of a sequence's tokens; None = the base's own.
        check_config: gets transformers' config. Raises BaseModelError if such a base cannot be served.
        check_base: gets the base and the device. Raises BaseModelError if this base cannot be served.
    """

    limits: Limits
    extra_bytes: int
    is_asked: Callable[[str], bool] = lambda _: False
    max_model_len: int | None = None
    check_config: Callable[[Any], None] | None = None
    check_base: Callable[[PreparedBase, str], None] | None = None


def prepare_run_base(config: TrainConfig, serving: Serving | None, progress: bool) -> PreparedBase:
    """The base of a run, prepared as the server prepares it.

    Raises:
        BaseModelError: it is not available, or ``serving`` refuses its config.
    """
    return prepare_base(
        config.base,
        config.home,
        config.quantization,
        config.head_quantization,
        progress,
        None if serving is None else serving.check_config,
        config.hf_overrides,
    )


def check_servable(config: TrainConfig, layout: BaseLayout, serving: Serving | None) -> None:
    """Raises RecipeInvalid if modules cannot be trained, or if ``serving`` would refuse the adapter."""
    sites = target_sites(config.target_modules, layout)
    if serving is not None:
        _check_rank(config, serving.limits.max_rank)
        _check_size(config, sites, layout, serving)


def target_sites(names: tuple[str, ...], layout: BaseLayout) -> list[Site]:
    """The linears that get an adapter, by PEFT's rules. Raises RecipeInvalid, which names other modules."""
    if names == ALL_LINEAR:
        return list(layout.sites.values())
    trainable = dict(layout.sites)
    if layout.head is not None:
        trainable[layout.head.name] = layout.head
    chosen: dict[str, Site] = {}
    for name in names:
        found = [module for module in layout.modules if module == name or module.endswith(f".{name}")]
        if not found:
            raise RecipeInvalid(
                f"--target-modules {name!r:.100} matches no module of the base; its linears are called "
                f"{', '.join(_endings(layout))}, or give all-linear."
            )
        if other := sorted(set(found) - trainable.keys()):
            raise RecipeInvalid(
                f"--target-modules {name!r:.100} is {other[0]}, which is not a linear and cannot be trained; "
                f"the base's linears are called {', '.join(_endings(layout))}."
            )
        chosen |= {module: trainable[module] for module in found}
    return list(chosen.values())


def _endings(layout: BaseLayout) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in layout.sites})


def _check_rank(config: TrainConfig, most: int) -> None:
    adalora = config.method == "adalora"
    rank = round(config.r * ADALORA_SURPLUS) if adalora else config.r
    if rank > most:
        may = f"--method adalora may leave rank {rank} at a module" if adalora else f"it makes rank {rank}"
        raise RecipeInvalid(
            f"--r {config.r} is too large to be served: {may}, and the server takes ranks up to {most} "
            "(--max-lora-rank); lower --r, or raise --max-lora-rank here and where it is served."
        )


def _check_size(config: TrainConfig, sites: list[Site], layout: BaseLayout, serving: Serving) -> None:
    settings = LoraSettings(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=tuple(site.name for site in sites),
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
    )
    try:
        plan = plan_adapter(_entries(sites, config), settings, layout)
        extras = check_limits(plan, serving.limits, layout, _SERVED_BYTES)[1]
    except AdapterError as error:
        raise RecipeInvalid(
            f"--r {config.r} with these --target-modules makes an adapter that cannot be served: {error}"
        ) from error
    if extras > serving.extra_bytes:
        raise RecipeInvalid(
            f"--method {config.method} with these --target-modules needs {extras} bytes besides rank rows, "
            f"but the server has {serving.extra_bytes} bytes for them; raise --lora-extra-memory."
        )


def _entries(sites: list[Site], config: TrainConfig) -> Iterator[TensorEntry]:
    for site in sites:
        key = f"base_model.model.{site.name}"
        yield _entry(f"{key}.lora_A.weight", config.r, site.in_features)
        yield _entry(f"{key}.lora_B.weight", site.out_features, config.r)
        if config.method == "dora":
            yield _entry(f"{key}.lora_magnitude_vector", site.out_features)


def _entry(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, "BF16", shape, 0, 0)
