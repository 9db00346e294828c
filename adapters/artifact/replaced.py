"""Parts of the base that an adapter replaces: norms, biases, the embedding, the output head.

There are two cases. ``modules_to_save`` gives the adapter a whole module. ``bias`` and
``save_embedding_layers`` save the base's parameters, and PEFT writes them back into the base when it loads
them. If embedding and head share one matrix, the second case changes both.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapters.artifact.config import LoraSettings
from adapters.artifact.header import TensorEntry
from adapters.artifact.names import Role
from adapters.errors import AdapterInvalid, AdapterUnsupported
from adapters.sites import BaseLayout, Site


@dataclass(frozen=True, slots=True)
class ReplacedPlan:
    """The tensors that replace the base's.

    Attributes:
        matrices: [vocabulary, hidden], by the name of the embedding or the head.
        norms: by norm and parameter.
        biases: of linears, by name.
        warnings: whole sentences about what the config names and the file lacks.
    """

    matrices: Mapping[str, TensorEntry]
    norms: Mapping[str, Mapping[str, TensorEntry]]
    biases: Mapping[str, TensorEntry]
    warnings: tuple[str, ...] = ()


def saved_modules(settings: LoraSettings, modules: Iterable[str]) -> frozenset[str]:
    """The modules that ``modules_to_save`` selects by the end of their names, as PEFT's ``_set_trainable``
    does."""
    return frozenset().union(*_by_ending(settings.modules_to_save, modules).values())


def _by_ending(endings: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names with each ending.

    The time grows with the sum of endings and names, not with their product.
    """
    reverse = sorted(name[::-1] for name in names)
    found: dict[str, list[str]] = {}
    for ending in dict.fromkeys(endings):
        begin = bisect_left(reverse, ending[::-1])
        end = bisect_right(reverse, ending[::-1], begin, key=lambda name: name[: len(ending)])
        found[ending] = [name[::-1] for name in reverse[begin:end]]
    return found


def plan_replaced(
    found: Mapping[str, Mapping[Role, TensorEntry]],
    adapted: frozenset[str],
    settings: LoraSettings,
    layout: BaseLayout,
) -> ReplacedPlan:
    """``found``: the file's tensors by module. ``adapted``: the modules with pairs.

    Raises AdapterInvalid or AdapterUnsupported.
    """
    saved = saved_modules(settings, layout.modules)
    _check_saved(saved, found, layout)
    weights = {name: tensors["weight"] for name, tensors in found.items() if "weight" in tensors}
    biases = {name: tensors["bias"] for name, tensors in found.items() if "bias" in tensors}
    _check_weights(weights, saved, layout)
    absent = _check_biases(biases, saved, adapted, settings, layout)
    norms = {
        norm: {role: found[norm][role] for role in ("weight", "bias") if role in found[norm]}
        for norm in layout.norms
        if norm in weights or norm in biases
    }
    _check_sizes(weights, norms, biases, layout)
    matrices = {name: entry for name, entry in weights.items() if name in layout.embedding_and_head}
    return ReplacedPlan(
        _both_if_shared(matrices, saved, layout),
        norms,
        {name: entry for name, entry in biases.items() if name not in layout.norms},
        (*_not_there(settings, layout), *absent),
    )


def _check_saved(
    saved: frozenset[str],
    found: Mapping[str, Mapping[Role, TensorEntry]],
    layout: BaseLayout,
) -> None:
    for module in sorted(saved - layout.norms.keys() - layout.embedding_and_head.keys()):
        raise AdapterUnsupported(
            f"modules_to_save: {module!r} of the base is neither a norm nor the embedding nor the output "
            "head; train other modules with LoRA."
        )
    missing = sorted(module for module in saved if "weight" not in found.get(module, {}))
    if missing:
        raise AdapterInvalid(f"modules_to_save names {missing[0]}, but the file does not contain its weight.")


def _not_there(settings: LoraSettings, layout: BaseLayout) -> tuple[str, ...]:
    """Warn about names that match nothing.

    PEFT adds classifier heads to every SEQ_CLS config and does not check.
    """
    found = _by_ending(settings.modules_to_save, layout.modules)
    names = [ending for ending, alike in found.items() if not alike]
    if not names:
        return ()
    shown = ", ".join(f"{name:.60}" for name in names[:3]) + (", …" if len(names) > 3 else "")
    return (f"modules_to_save names {shown}, which the base does not have.",)


def _check_weights(weights: Mapping[str, TensorEntry], saved: frozenset[str], layout: BaseLayout) -> None:
    for name in sorted(weights.keys() - saved - layout.embedding_and_head.keys()):
        raise AdapterUnsupported(
            f"Tensor {weights[name].name!r} would replace the base's {name}, "
            "which modules_to_save does not name."
        )


def _check_biases(
    biases: Mapping[str, TensorEntry],
    saved: frozenset[str],
    adapted: frozenset[str],
    settings: LoraSettings,
    layout: BaseLayout,
) -> tuple[str, ...]:
    """A warning about trained biases that the file lacks. PEFT warns too, and keeps the base's."""
    trained = {"none": frozenset(), "lora_only": adapted, "all": layout.biases}[settings.bias]
    expected = layout.biases & (trained | saved)
    if extra := sorted(biases.keys() - expected):
        raise AdapterInvalid(
            f"Tensor {biases[extra[0]].name!r} is in the file, but with bias={settings.bias!r} in the config "
            "it is not one of the trained biases of this base."
        )
    missing = sorted(expected - biases.keys())
    if lost := sorted(saved.intersection(missing)):
        raise AdapterInvalid(f"modules_to_save names {lost[0]}, but the file does not contain its bias.")
    if not missing:
        return ()
    return (
        f"bias is {settings.bias!r}, but the file lacks {len(missing)} biases, which stay as in the base: "
        f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}.",
    )


def _check_sizes(
    weights: Mapping[str, TensorEntry],
    norms: Mapping[str, Mapping[str, TensorEntry]],
    biases: Mapping[str, TensorEntry],
    layout: BaseLayout,
) -> None:
    expected: dict[str, tuple[TensorEntry, tuple[int, ...]]] = {}
    for name, module in layout.embedding_and_head.items():
        if name in weights:
            embeds = module is layout.embedding
            size = (module.in_features, module.out_features)
            size = size if embeds else size[::-1]
            expected[f"{name}.weight"] = weights[name], size
    for norm, parameters in norms.items():
        for role, entry in parameters.items():
            expected[f"{norm}.{role}"] = entry, (layout.norms[norm][role],)
    for name in biases.keys() - layout.norms.keys():
        place = layout.sites.get(name) or layout.embedding_and_head[name]
        expected[f"{name}.bias"] = biases[name], (place.out_features,)
    for parameter, (entry, shape) in expected.items():
        if entry.shape != shape:
            check_vocabulary(
                entry, shape, layout.embedding_and_head.get(parameter.removesuffix(".weight")), layout
            )
            raise AdapterInvalid(
                f"Tensor {entry.name!r} has shape {list(entry.shape)}, but the base's {parameter} has "
                f"{list(shape)}; the adapter was trained on another base."
            )


def check_vocabulary(
    entry: TensorEntry, shape: tuple[int, ...], place: Site | None, layout: BaseLayout
) -> None:
    """Raises AdapterUnsupported if the shape differs from ``shape`` only in the vocabulary."""
    module = layout.embedding_and_head.get(place.name) if place is not None else None
    if module is None or len(entry.shape) != len(shape):
        return
    size = module.in_features if module is layout.embedding else module.out_features
    match [(there, wanted) for there, wanted in zip(entry.shape, shape, strict=True) if there != wanted]:
        case [(there, wanted)] if wanted == size:
            raise AdapterUnsupported(
                f"Tensor {entry.name!r} is for a vocabulary of {there} tokens, but the base has {size}: the "
                "vocabulary was resized in training (resize_token_embeddings). Train with the base's own "
                "tokens, or resize the base in the same way, save it, and serve that."
            )


def _both_if_shared(
    matrices: dict[str, TensorEntry], saved: frozenset[str], layout: BaseLayout
) -> dict[str, TensorEntry]:
    in_place = [entry for name, entry in matrices.items() if name not in saved]
    if layout.tied and in_place:
        return {
            name: matrices.get(name, in_place[0]) for name in layout.embedding_and_head if name not in saved
        } | {name: matrices[name] for name in layout.embedding_and_head if name in saved}
    return matrices
