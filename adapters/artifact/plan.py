"""Header and config against the base: which tensor is whose, before any tensor byte is read.

Everything that can be refused without the values is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from adapters.artifact.adapter import Limits
from adapters.artifact.config import LoraSettings
from adapters.artifact.header import TensorEntry
from adapters.artifact.targets import resolve_targets, targeted_modules
from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from adapters.sites import BaseLayout, Site

Side = Literal["A", "B"]

_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

_FOREIGN = {
    re.compile(r"lora_embedding_[AB]"): "LoRA on embeddings is not served yet; target linear modules only",
    re.compile(r"lora_magnitude_vector"): "it belongs to DoRA, which is not served yet",
    re.compile(r"lora_B\.(?:[^.]+\.)?bias$"): "a bias on lora_B is not served; train with lora_bias=false",
    re.compile(r"modules_to_save"): "whole modules are not served; train without modules_to_save",
    re.compile(r"(?:^|\.)(?:embed_tokens|wte|lm_head)\.(?:[^.]+\.)?weight$"): (
        "a whole embedding or output head would replace the base's; save with save_embedding_layers=False"
    ),
    re.compile(r"\.bias$"): "trained biases are not served; train with bias='none'",
}


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site of the adapter: its two tensors and what their product is multiplied by."""

    site: Site
    a: TensorEntry
    b: TensorEntry
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


def plan_sites(
    entries: Iterable[TensorEntry], settings: LoraSettings, layout: BaseLayout
) -> tuple[SitePlan, ...]:
    """Every site that the adapter has, in the layout's order.

    Raises AdapterInvalid (tensors, config and base disagree) or AdapterUnsupported.
    """
    pairs = _pair_up(entries, layout)
    targeted = _targeted_sites(settings, layout)
    _check_same_sites(pairs, targeted)
    plans = []
    for name in (name for name in layout.sites if name in pairs):
        rank, scale = targeted[name]
        _check_shapes(layout.sites[name], pairs[name], rank)
        plans.append(SitePlan(layout.sites[name], pairs[name]["A"], pairs[name]["B"], scale))
    return tuple(plans)


def check_limits(plans: Iterable[SitePlan], limits: Limits, item_bytes: int) -> int:
    """Size as served, in bytes, at ``item_bytes`` a value. Raises AdapterTooLarge."""
    total = 0
    for plan in plans:
        if plan.rank > limits.max_rank:
            raise AdapterTooLarge(
                f"{plan.site.name} has rank {plan.rank}; --max-lora-rank allows {limits.max_rank}."
            )
        total += plan.rank * (plan.site.in_features + plan.site.out_features) * item_bytes
    if total > limits.max_bytes:
        raise AdapterTooLarge(
            f"The adapter takes {total} bytes as served; this server allows {limits.max_bytes}."
        )
    return total


def _pair_up(entries: Iterable[TensorEntry], layout: BaseLayout) -> dict[str, dict[Side, TensorEntry]]:
    pairs: dict[str, dict[Side, TensorEntry]] = {}
    adapter_names: set[str] = set()
    for entry in entries:
        module, side, adapter = _parse_name(entry.name, layout)
        adapter_names.add(adapter)
        if side in pairs.setdefault(module, {}):
            raise AdapterInvalid(
                f"{entry.name!r} and {pairs[module][side].name!r} are the same tensor's names."
            )
        pairs[module][side] = entry
    if len(adapter_names) > 1:
        raise AdapterInvalid(
            f"The file mixes the tensors of several adapters: {', '.join(sorted(adapter_names))}."
        )
    for module, pair in pairs.items():
        if len(pair) == 1:
            (side,) = pair
            raise AdapterInvalid(
                f"{module} has only lora_{side}; its lora_{'AB'.replace(side, '')} is missing."
            )
    return pairs


def _parse_name(name: str, layout: BaseLayout) -> tuple[str, Side, str]:
    match = _LORA_TENSOR.fullmatch(_WRAPPERS.sub("", name))
    if match is None:
        raise _foreign_tensor(name)
    module = match["module"].removeprefix(_PREFIX)
    if module in layout.sites:
        return module, "A" if match["side"] == "A" else "B", match["adapter"] or "default"
    if module in layout.modules:
        raise AdapterUnsupported(_not_a_site(module))
    near = get_close_matches(module, layout.sites, n=3)
    raise AdapterInvalid(
        f"Tensor {name!r} matches no linear of the base ({layout.name_or_path}); "
        + (f"the nearest are {', '.join(near)}." if near else "the adapter seems to be for another base.")
    )


def _foreign_tensor(name: str) -> AdapterInvalid | AdapterUnsupported:
    for pattern, reason in _FOREIGN.items():
        if pattern.search(name):
            return AdapterUnsupported(f"Tensor {name!r} cannot be served: {reason}.")
    return AdapterInvalid(
        f"Tensor {name!r} is no LoRA tensor; only '….lora_A.weight' and '….lora_B.weight' are."
    )


def _targeted_sites(settings: LoraSettings, layout: BaseLayout) -> dict[str, tuple[int, float]]:
    targeted = targeted_modules(settings, layout.modules | layout.sites.keys(), layout.sites)
    if not targeted:
        raise AdapterInvalid(
            f"target_modules {settings.target_modules!r:.200} matches no module of the base."
        )
    for module in sorted(targeted - layout.sites.keys()):
        raise AdapterUnsupported(f"target_modules: {_not_a_site(module)}")
    return {name: (target.rank, target.scale) for name, target in resolve_targets(settings, targeted).items()}


def _not_a_site(module: str) -> str:
    return (
        f"{module or 'the whole model'!r} of the base is not a linear inside a decoder block; "
        "LoRA on anything else (embeddings, output head) is not served yet."
    )


def _check_same_sites(pairs: Mapping[str, object], targeted: Mapping[str, object]) -> None:
    if missing := [name for name in targeted if name not in pairs]:
        raise AdapterInvalid(
            f"{len(missing)} of the modules that target_modules names have no tensors: {_some(missing)}."
        )
    if extra := [name for name in pairs if name not in targeted]:
        raise AdapterInvalid(
            f"{len(extra)} modules have tensors, but target_modules does not name them: {_some(extra)}."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _check_shapes(site: Site, pair: Mapping[Side, TensorEntry], rank: int) -> None:
    expected = {"A": (rank, site.in_features), "B": (site.out_features, rank)}
    for side, entry in pair.items():
        if entry.shape != expected[side]:
            raise AdapterInvalid(
                f"Tensor {entry.name!r} has shape {list(entry.shape)}; rank {rank} of the config and "
                f"the base's {site.name} ({site.in_features} → {site.out_features}) make it "
                f"{list(expected[side])}."
            )
