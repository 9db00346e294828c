"""Assigns each tensor of the header to a module of the base, before any tensor byte is read.

Everything that can be refused without the values is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapters.artifact.adapter import Limits
from adapters.artifact.config import LoraSettings
from adapters.artifact.header import TensorEntry
from adapters.artifact.names import Role, not_adaptable, parse_name
from adapters.artifact.regex import config_budget
from adapters.artifact.replaced import ReplacedPlan, check_vocabulary, plan_replaced, saved_modules
from adapters.artifact.targets import Target, resolve_targets, targeted_modules
from adapters.errors import AdapterInvalid, AdapterTooLarge, AdapterUnsupported
from adapters.sites import BaseLayout, Site

Tensors = dict[Role, TensorEntry]

_FLOAT32 = 4
"""Bytes of one value of a scale, shift or norm."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One pair of the adapter, and the factor of its product.

    Attributes:
        magnitude: DoRA's vector, or None.
        bias: the bias of ``lora_B``, or None.
    """

    site: Site
    a: TensorEntry
    b: TensorEntry
    scale: float
    magnitude: TensorEntry | None
    bias: TensorEntry | None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Every tensor of the adapter, assigned to its module.

    Attributes:
        sites: the pairs at linears inside the blocks, in the layout's order.
        embedding_and_head: the pairs at the embedding and the output head, by name.
        replaced: what replaces parts of the base.
        warnings: whole sentences about what the config names and the file lacks.
    """

    sites: tuple[SitePlan, ...]
    embedding_and_head: Mapping[str, SitePlan]
    replaced: ReplacedPlan
    warnings: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[SitePlan, ...]:
        return (*self.sites, *self.embedding_and_head.values())

    @property
    def used(self) -> frozenset[str]:
        """The names of the tensors that are served. The file may also have copies of the base's tensors."""
        pairs = (entry for pair in self.pairs for entry in (pair.a, pair.b, pair.magnitude, pair.bias))
        norms = (entry for norm in self.replaced.norms.values() for entry in norm.values())
        replaced = (*self.replaced.matrices.values(), *norms, *self.replaced.biases.values())
        return frozenset(entry.name for entry in (*pairs, *replaced) if entry is not None)


def plan_adapter(entries: Iterable[TensorEntry], settings: LoraSettings, layout: BaseLayout) -> AdapterPlan:
    """Raises AdapterInvalid (tensors, config and base disagree) or AdapterUnsupported."""
    found = _by_module(entries, layout)
    with config_budget():
        targeted = _targets(settings, layout)
    pairs = {module: tensors for module, tensors in found.items() if tensors.keys() - {"weight", "bias"}}
    absent = _check_same_modules(pairs, targeted)
    places = {**layout.sites, **layout.embedding_and_head}
    plans = {
        name: _plan_pair(places[name], pairs[name], targeted[name], settings, layout)
        for name in places
        if name in pairs
    }
    replaced = plan_replaced(found, frozenset(pairs), settings, layout)
    return AdapterPlan(
        tuple(plan for name, plan in plans.items() if name in layout.sites),
        {name: plan for name, plan in plans.items() if name in layout.embedding_and_head},
        replaced,
        (*absent, *replaced.warnings),
    )


def check_limits(plan: AdapterPlan, limits: Limits, layout: BaseLayout, item_bytes: int) -> tuple[int, int]:
    """Bytes as served, at ``item_bytes`` a value: in total, and without the rank rows.

    Raises AdapterTooLarge.
    """
    for pair in plan.pairs:
        if pair.rank > limits.max_rank:
            raise AdapterTooLarge(
                f"{pair.site.name} has rank {pair.rank}; --max-lora-rank allows {limits.max_rank}."
            )
    rows = sum(_pair_size(pair) for pair in plan.sites) * item_bytes
    extras = extra_bytes(plan, layout, item_bytes)
    if rows + extras > limits.max_bytes:
        raise AdapterTooLarge(
            f"The adapter takes {rows + extras} bytes as served; this server allows {limits.max_bytes} "
            "(--max-lora-bytes). Save it with save_embedding_layers=False to leave out whole embeddings."
            if plan.replaced.matrices
            else f"The adapter takes {rows + extras} bytes as served; this server allows {limits.max_bytes} "
            "(--max-lora-bytes)."
        )
    return rows + extras, extras


def extra_bytes(plan: AdapterPlan, layout: BaseLayout, item_bytes: int) -> int:
    """Bytes of the ``Extras`` that this plan produces."""
    pairs = sum(_pair_size(pair) for pair in plan.embedding_and_head.values())
    matrices = sum(entry.shape[0] * entry.shape[1] for entry in plan.replaced.matrices.values())
    vectors = sum(size for norm in plan.replaced.norms for size in layout.norms[norm].values())
    vectors += sum(pair.site.out_features for pair in plan.pairs if pair.magnitude is not None)
    places = {**layout.sites, **layout.embedding_and_head}
    vectors += sum(places[name].out_features for name in shifted(plan, layout))
    return (pairs + matrices) * item_bytes + vectors * _FLOAT32


def shifted(plan: AdapterPlan, layout: BaseLayout) -> set[str]:
    """The modules whose output is shifted by a constant."""
    moved = {p.site.name for p in plan.pairs if p.bias is not None}
    # DoRA does not scale the base's bias, but the output that is scaled contains it.
    moved |= {p.site.name for p in plan.pairs if p.magnitude is not None} & layout.biases
    return moved | plan.replaced.biases.keys()


def _pair_size(pair: SitePlan) -> int:
    return pair.rank * (pair.site.in_features + pair.site.out_features)


def _by_module(entries: Iterable[TensorEntry], layout: BaseLayout) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    wrapped: dict[str, Tensors] = {}
    adapter_names: set[str] = set()
    for entry in entries:
        name = parse_name(entry.name, layout)
        if name.role not in ("weight", "bias", "magnitude"):
            adapter_names.add(name.adapter or "default")
        if name.copy == "original":
            continue
        tensors = (wrapped if name.copy == "wrapped" else found).setdefault(name.module, {})
        if name.role in tensors:
            raise AdapterInvalid(
                f"{entry.name!r} and {tensors[name.role].name!r} name the same tensor; remove one of them."
            )
        tensors[name.role] = entry
    if len(adapter_names) > 1:
        raise AdapterInvalid(
            f"The file mixes the tensors of several adapters ({_first_names(sorted(adapter_names))}); save "
            "each one in its own folder."
        )
    for module, tensors in wrapped.items():  # a copy, which PEFT ignores too
        found[module] = {**tensors, **found.get(module, {})}
    return found


def _targets(settings: LoraSettings, layout: BaseLayout) -> dict[str, Target]:
    places = layout.sites.keys() | layout.embedding_and_head.keys()
    targeted = targeted_modules(settings, layout.modules | places, layout.sites)
    if not targeted:
        raise AdapterInvalid(
            f"target_modules {settings.target_modules!r:.200} matches no module of the base; the adapter "
            "seems to be for another base."
        )
    tie = settings.ensure_weight_tying and layout.tied
    if tie and layout.embedding and layout.head and layout.embedding.name in targeted:
        targeted |= {layout.head.name}  # PEFT gives the head the same pair with A and B swapped
    targeted -= saved_modules(settings, layout.embedding_and_head)
    for module in sorted(targeted - places):
        raise AdapterUnsupported(f"target_modules: {not_adaptable(module, layout)}")
    return resolve_targets(settings, targeted)


def _check_same_modules(pairs: Mapping[str, object], targeted: Mapping[str, object]) -> tuple[str, ...]:
    """A warning about modules without tensors. PEFT warns too, and leaves their lora_B at zero."""
    if extra := [name for name in pairs if name not in targeted]:
        raise AdapterInvalid(
            f"{len(extra)} modules have tensors, but target_modules does not select them: "
            f"{_first_names(extra)}."
        )
    missing = [name for name in targeted if name not in pairs]
    if len(missing) == len(targeted):
        raise AdapterInvalid(
            f"None of the modules that target_modules selects has tensors: {_first_names(missing)}."
        )
    if not missing:
        return ()
    return (
        f"{len(missing)} of the modules that target_modules selects have no tensors and stay as in the base: "
        f"{_first_names(missing)}.",
    )


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _plan_pair(
    site: Site, tensors: Tensors, target: Target, settings: LoraSettings, layout: BaseLayout
) -> SitePlan:
    wanted = {"lora_A", "lora_B"}
    wanted |= {"magnitude"} if settings.use_dora else set()
    wanted |= {"lora_B.bias"} if settings.lora_bias else set()
    given = tensors.keys() - {"weight", "bias"}
    if missing := wanted - given:
        raise AdapterInvalid(
            f"{site.name} has only {', '.join(sorted(given))}; its {sorted(missing)[0]} is missing."
        )
    if extra := given - wanted:
        role = sorted(extra)[0]
        option = "use_dora" if role == "magnitude" else "lora_bias"
        raise AdapterInvalid(f"{tensors[role].name!r} is in the file, but {option} is false in the config.")
    _check_shapes(site, tensors, target.rank, layout)
    return SitePlan(
        site, tensors["lora_A"], tensors["lora_B"], target.scale,
        tensors.get("magnitude"), tensors.get("lora_B.bias"),
    )  # fmt: skip


def _check_shapes(site: Site, tensors: Tensors, rank: int, layout: BaseLayout) -> None:
    expected: dict[Role, tuple[int, ...]] = {
        "lora_A": (rank, site.in_features),
        "lora_B": (site.out_features, rank),
        "magnitude": (site.out_features,),
        "lora_B.bias": (site.out_features,),
    }
    _check_gathered(tensors)
    for role, shape in expected.items():
        if role in tensors and tensors[role].shape != shape:
            check_vocabulary(tensors[role], shape, site, layout)
            raise AdapterInvalid(
                f"Tensor {tensors[role].name!r} has shape {list(tensors[role].shape)}; it must be "
                f"{list(shape)}, for rank {rank} of the config and the base's {site.name} "
                f"({site.in_features} → {site.out_features})."
            )


def _check_gathered(tensors: Tensors) -> None:
    """Refuse shards: sharded training saves flat pieces and empty tensors if they are not gathered first."""
    for entry in (tensors["lora_A"], tensors["lora_B"]):
        if len(entry.shape) < 2 or 0 in entry.shape:
            raise AdapterInvalid(
                f"Tensor {entry.name!r} has shape {list(entry.shape)}, so it is empty or a shard: DeepSpeed "
                "ZeRO-3 or FSDP did not gather the weights before they were saved; use GatheredParameters or "
                "summon_full_params."
            )
