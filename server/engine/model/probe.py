"""Runs a base on a few tokens to learn how it attends and what its linears receive."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapters.base import LoadedBase
from adapters.base.calls import Call, noting_calls, why_unservable
from adapters.base.context import own_length
from adapters.base.implementations import implementations_of
from server.engine.attention import AttentionHost, AttentionSpec, KvShape, install, reading_masks
from server.engine.model.supported import check_config, check_layers, naming

log = logging.getLogger("manylora.engine")

_TOKENS = 5

_LONGEST = 1 << 20
"""Masks are read for sequences up to this length."""

_PASS = "its forward pass over a step's tokens, without a cache of its own,"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the run showed.

    Attributes:
        host: receives the model's attention calls from now on.
        shapes, specs: the shape of keys and values, and the attention spec, by layer.
        calls: by linear, what its calls looked like; empty = it was not called.
        own_attention: transformers' attention implementations that the model was loaded with, as
            ``implementations_of`` gives them.
    """

    host: AttentionHost
    shapes: Mapping[int, KvShape]
    specs: Mapping[int, AttentionSpec]
    calls: Mapping[str, frozenset[Call]]
    own_attention: dict[str, Any]


@torch.inference_mode()
def probe(base: LoadedBase, longest: int | None = None) -> Probe:
    """Run ``base`` on five tokens, of which one gives logits. Its modules must not be wrapped yet.

    Args:
        longest: as in ``check_config``.

    Raises:
        BaseModelError: it cannot be served; names its architecture and the reason.
    """
    model, config = base.model, base.model.config
    check_config(config, longest)
    shapes: dict[int, KvShape] = {}
    specs: dict[int, AttentionSpec] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        shapes[layer] = KvShape(k.shape[1], k.shape[2], v.shape[2])
        specs[layer] = spec
        return q.new_zeros(*q.shape[:2], v.shape[2])

    own_attention = implementations_of(config)
    with naming(config, _PASS), noting_calls(model, base.layout.sites) as calls:
        host = install(model)
        host.handler = attend
        tokens = torch.arange(_TOKENS, device=model.device)
        lengths = (own_length(config.get_text_config()), longest, _LONGEST)
        with reading_masks(model, host, min(length for length in lengths if length)):
            forward(model, tokens, tokens, torch.tensor([_TOKENS // 2], device=model.device))
    check_layers(config, shapes)
    return Probe(host, shapes, specs, {name: frozenset(some) for name, some in calls.items()}, own_attention)


def forward(model: Any, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """float32 logits [n, vocabulary] of the step's tokens ``rows`` [n]."""
    out = model(input_ids=tokens[None], position_ids=positions[None], logits_to_keep=rows, use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits


def servable(base: LoadedBase, found: Probe) -> LoadedBase:
    """``base`` without the linears that LoRA cannot apply to."""
    unservable = {
        name: reason
        for name, calls in found.calls.items()
        if (reason := why_unservable(calls, _TOKENS)) is not None
    }
    if not unservable:
        return base
    log.info("LoRA cannot apply to %d linears; the first is %s", len(unservable), next(iter(unservable)))
    sites = {name: site for name, site in base.layout.sites.items() if name not in unservable}
    return replace(base, layout=replace(base.layout, sites=sites, unservable=unservable))
