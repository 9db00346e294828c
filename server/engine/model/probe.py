"""Runs a base on a few tokens to learn how it attends and what its linears receive."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.base import LoadedBase
from adapters.base.context import own_length
from server.engine.attention import (
    AttentionHost,
    AttentionSpec,
    KvShape,
    implementations_of,
    install,
    reading_masks,
)
from server.engine.model.supported import check_config, check_layers, naming

log = logging.getLogger("manylora.engine")

_TOKENS = 5

_LONGEST = 1 << 20
"""Masks are read for sequences up to this length."""

_PASS = "its forward pass over a step's tokens, without a cache of its own,"


class Call(NamedTuple):
    """One call of a linear: the rows that it got, and whether it returned one tensor with a row for each."""

    rows: int
    is_plain: bool


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

    calls: dict[str, set[Call]] = {name: set() for name in base.layout.sites}
    own_attention = implementations_of(config)
    with naming(config, _PASS), _noting(model, calls):
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
        name: reason for name, calls in found.calls.items() if (reason := _why_unservable(calls)) is not None
    }
    if not unservable:
        return base
    log.info("LoRA cannot apply to %d linears; the first is %s", len(unservable), next(iter(unservable)))
    sites = {name: site for name, site in base.layout.sites.items() if name not in unservable}
    return replace(base, layout=replace(base.layout, sites=sites, unservable=unservable))


def _why_unservable(calls: frozenset[Call]) -> str | None:
    if any(not call.is_plain for call in calls):
        return "it returns more than a linear's output, as routers of experts do"
    if {call.rows for call in calls} != {_TOKENS}:
        return "the base does not run it on each token of a step by itself"
    return None


@contextmanager
def _noting(model: Any, calls: Mapping[str, set[Call]]) -> Iterator[None]:
    """Record the calls of these linears."""

    def note(seen: set[Call], _: object, inputs: tuple[Tensor, ...], output: object) -> None:
        rows = inputs[0].shape[:-1]
        is_plain = isinstance(output, Tensor) and output.shape[:-1] == rows
        seen.add(Call(math.prod(rows), is_plain))

    hooks = [
        model.get_submodule(name).register_forward_hook(partial(note, seen)) for name, seen in calls.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
