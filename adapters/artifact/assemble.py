"""Turns planned, converted tensors into what is served. DoRA and biases are resolved against the base here.

Equations (PEFT, ``peft.tuners.lora``; W and c are the base's weight and bias, s the scale):

    LoRA    y =  W x + c        + s B A x  + s d            d: lora_B's own bias
    DoRA    y =  g W x + c      + g s B A x                 g = m / |W + s B A|, by output row
    bias    the adapter's c' replaces c

The base computes W x + c, so all of them are  y = scale * (W x + c) + shift + B' (A x)  with B' = g s B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from adapters.artifact.adapter import Adjustment, EmbeddingOrHead, Extras, LoraWeights
from adapters.artifact.plan import AdapterPlan, SitePlan, shifted
from adapters.errors import AdapterInvalid, AdapterUnsupported
from adapters.sites import BaseLayout

_CHUNK = 1024
"""Output rows whose norm is computed at a time. This bounds the memory for large linears."""


class BaseWeights(Protocol):
    """The base's weights; see ``adapters/base/weights.py``."""

    def dense(self, name: str) -> Tensor:
        """[out_features, in_features] of a linear; the embedding's is [hidden, vocabulary]."""

    def bias(self, name: str) -> Tensor | None:
        """[out_features], or None where the base has none."""


def assemble(
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    layout: BaseLayout,
    base: BaseWeights | None,
    dtype: torch.dtype,
) -> tuple[dict[str, LoraWeights], Extras]:
    """Returns the pairs by site, and the extras, from tensors by name as ``load.py`` converts them.

    ``base`` may be None if there is neither DoRA nor a bias. Raises AdapterInvalid.
    """
    pairs: dict[str, LoraWeights] = {}
    scales: dict[str, Tensor] = {}
    for pair in plan.pairs:
        name = pair.site.name
        a, b = tensors[pair.a.name], tensors[pair.b.name]
        if pair.magnitude is not None:
            assert base is not None
            weight = _weight(name, plan, tensors, layout, base)
            scales[name] = _dora_scale(pair, weight, a, b, tensors[pair.magnitude.name])
            b = b * scales[name]
        pairs[name] = LoraWeights(a, b.to(dtype))
    shifts = {name: _shift(name, plan, tensors, base, scales.get(name)) for name in shifted(plan, layout)}
    adjustments = {
        name: Adjustment(scales.get(name), shifts.get(name)) for name in scales.keys() | shifts.keys()
    }
    extras = Extras(
        MappingProxyType({name: a for name, a in adjustments.items() if name in layout.sites}),
        {
            name: {role: tensors[e.name] for role, e in norm.items()}
            for name, norm in plan.replaced.norms.items()
        },
        *(
            _embedding_or_head(site.name, plan, tensors, pairs, adjustments) if site is not None else None
            for site in (layout.embedding, layout.head)
        ),
    )
    return {name: pair for name, pair in pairs.items() if name in layout.sites}, extras


def without_copies(
    plan: AdapterPlan, tensors: Mapping[str, Tensor], layout: BaseLayout, base: BaseWeights
) -> AdapterPlan:
    """The plan without matrices that equal the base's bit for bit. PEFT saves those beside their LoRA.

    Raises AdapterUnsupported.
    """
    matrices = {
        name: entry
        for name, entry in plan.replaced.matrices.items()
        if not torch.equal(tensors[entry.name], _matrix(name, layout, base).cpu())
    }
    if layout.head_apart and len({entry.name for entry in matrices.values()}) < len(matrices):
        tensor = next(iter(matrices.values())).name
        raise AdapterUnsupported(
            f"Tensor {tensor!r} replaces the matrix that embedding and head share, "
            "but --head-quantization nf4 separates them, and the adapter does not say whether the head "
            "changes too; serve it with --head-quantization none, or train it with modules_to_save."
        )
    return replace(plan, replaced=replace(plan.replaced, matrices=matrices))


def _matrix(name: str, layout: BaseLayout, base: BaseWeights) -> Tensor:
    """[vocabulary, hidden]: the base's matrix as adapters' files store it.

    If the head is quantised apart, files still have one matrix for embedding and head.
    """
    if layout.head_apart and layout.embedding is not None:
        name = layout.embedding.name
    return _as_linear(base.dense(name), name, layout)


def _as_linear(matrix: Tensor, name: str, layout: BaseLayout) -> Tensor:
    embeds = layout.embedding is not None and name == layout.embedding.name
    return matrix.t() if embeds else matrix


def _embedding_or_head(
    name: str,
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    pairs: Mapping[str, LoraWeights],
    adjustments: Mapping[str, Adjustment],
) -> EmbeddingOrHead | None:
    entry = plan.replaced.matrices.get(name)
    replacement = EmbeddingOrHead(
        None if entry is None else tensors[entry.name], pairs.get(name), adjustments.get(name)
    )
    changed = replacement.matrix is not None or replacement.lora or replacement.adjustment
    return replacement if changed else None


def _weight(
    name: str, plan: AdapterPlan, tensors: Mapping[str, Tensor], layout: BaseLayout, base: BaseWeights
) -> Tensor:
    """[out, in]: the adapter's matrix, or the base's."""
    entry = plan.replaced.matrices.get(name)
    if entry is None:
        return base.dense(name)
    return _as_linear(tensors[entry.name], name, layout)


def _dora_scale(pair: SitePlan, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """g, float32 [out]. a: [rank, in]; b: float32 [rank, out], its scale folded in."""
    norms = torch.empty(pair.site.out_features)
    a, there = a.float().to(weight.device), b.to(weight.device)  # where the larger weight is
    for start in range(0, len(norms), _CHUNK):
        rows = slice(start, start + _CHUNK)
        adapted = torch.addmm(weight[rows].float(), there[:, rows].t(), a)
        norms[rows] = torch.linalg.vector_norm(adapted, dim=1).cpu()
    scale = magnitude / norms
    if not bool(torch.isfinite(scale).all()):
        raise AdapterInvalid(
            f"DoRA at {pair.site.name} divides by zero, because a row of the adapted "
            "weight is zero; train the adapter again."
        )
    return scale


def _shift(
    name: str,
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    base: BaseWeights | None,
    scale: Tensor | None,
) -> Tensor:
    """float32 [out]; see the equations above."""
    assert base is not None
    there = base.bias(name)
    replaced = tensors[plan.replaced.biases[name].name].float() if name in plan.replaced.biases else None
    pair = next((pair for pair in plan.pairs if pair.site.name == name), None)
    shift = torch.zeros(1)
    if there is not None and (replaced is not None or scale is not None):
        there = there.float().cpu()
        shift = (there if replaced is None else replaced) - (there if scale is None else scale * there)
    if pair is not None and pair.bias is not None:
        shift = shift + pair.scale * tensors[pair.bias.name]
    return shift.clone()
