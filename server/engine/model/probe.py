"""Runs a base on a few tokens to learn how it attends and what its linears receive."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.base import LoadedBase
from adapters.errors import BaseModelError
from server.engine.attention import AttentionHost, AttentionSpec, KvShape, install
from server.engine.model.supported import check_config, check_layers, name_of

log = logging.getLogger("manylora.engine")

_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Probe:
    """What the run showed.

    Attributes:
        host: receives the model's attention calls from now on.
        shapes, specs: the shape of keys and values, and the attention spec, by layer.
        rows: by linear, the row counts of its inputs; empty = it was not called.
    """

    host: AttentionHost
    shapes: Mapping[int, KvShape]
    specs: Mapping[int, AttentionSpec]
    rows: Mapping[str, frozenset[int]]


@torch.inference_mode()
def probe(base: LoadedBase) -> Probe:
    """Run ``base`` on five tokens, of which one gives logits. Its modules must not be wrapped yet.

    Raises:
        BaseModelError: it cannot be served; names its architecture and the reason.
    """
    model, config = base.model, base.model.config
    check_config(config)
    shapes: dict[int, KvShape] = {}
    specs: dict[int, AttentionSpec] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        shapes[layer] = KvShape(k.shape[1], k.shape[2], v.shape[2])
        specs[layer] = spec
        return q.new_zeros(*q.shape[:2], v.shape[2])

    rows: dict[str, set[int]] = {name: set() for name in base.layout.sites}
    with _naming(config), _counting(model, rows):
        host = install(model)
        host.handler = attend
        tokens = torch.arange(_TOKENS, device=model.device)
        forward(model, tokens, tokens, torch.tensor([_TOKENS // 2], device=model.device))
    check_layers(config, shapes)
    return Probe(host, shapes, specs, {name: frozenset(counts) for name, counts in rows.items()})


def forward(model: Any, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """float32 logits [n, vocabulary] of the step's tokens ``rows`` [n]."""
    out = model(input_ids=tokens[None], position_ids=positions[None], logits_to_keep=rows, use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits


def servable(base: LoadedBase, found: Probe) -> LoadedBase:
    """``base`` without the linears that LoRA cannot apply to, because they do not see each token once."""
    unservable = {
        name: "the base does not run it on each token of a step by itself"
        for name, counts in found.rows.items()
        if counts != {_TOKENS}
    }
    if not unservable:
        return base
    log.info("LoRA cannot apply to %d linears; the first is %s", len(unservable), next(iter(unservable)))
    sites = {name: site for name, site in base.layout.sites.items() if name not in unservable}
    return replace(base, layout=replace(base.layout, sites=sites, unservable=unservable))


@contextmanager
def _counting(model: Any, rows: dict[str, set[int]]) -> Iterator[None]:
    """Record the row counts of these linears' inputs."""

    def note(counts: set[int], _: object, inputs: tuple[Tensor, ...]) -> None:
        counts.add(math.prod(inputs[0].shape[:-1]))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(note, counts))
        for name, counts in rows.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _naming(config: Any) -> Iterator[None]:
    """Turn any exception from the model's code into a BaseModelError that names the architecture."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BaseModelError as error:
        raise BaseModelError(f"{name_of(config)} cannot be served: {error}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BaseModelError(
            f"{name_of(config)} cannot be served: its forward pass over a step's tokens, without a cache of "
            f"its own, raised {type(error).__name__} ({reason})."
        ) from error
