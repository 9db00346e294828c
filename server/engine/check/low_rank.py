"""A small random adapter on every linear that adapters may add to: for the rank pool, and as plain hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.sites import Site

_RANK = 4

_SIZE = 0.1
"""Size of the adapter's part at a linear, as a share of the linear's own output."""


@contextmanager
def measuring(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[dict[str, float]]:
    """Fills the result, by site, with the size of the linear's output divided by that of its input."""
    gains: dict[str, float] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        size = _rms(inputs[0])
        gains[name] = _rms(output) / size if size else 0.0

    with _hooked(model, {name: partial(note, name) for name in sites}):
        yield gains


def random_adapter(sites: Mapping[str, Site], gains: Mapping[str, float], most: int) -> Adapter:
    """Random bf16 pairs on ``sites``. Each adds a tenth of what its linear gives.

    Args:
        gains: as from ``measuring``.
        most: the largest rank that there may be.
    """
    rank = min(_RANK, most)
    chance = torch.Generator().manual_seed(0)
    weights: dict[str, LoraWeights] = {}
    for name, site in sites.items():
        a = torch.randn(rank, site.in_features, generator=chance) * site.in_features**-0.5
        b = torch.randn(rank, site.out_features, generator=chance) * rank**-0.5 * gains.get(name, 0.0) * _SIZE
        weights[name] = LoraWeights(a.bfloat16(), b.bfloat16())
    info = AdapterInfo("check", dict.fromkeys(sites, rank), 0, None, ())
    return Adapter(info, weights)


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """While it lasts, the linears of ``model`` add what ``adapter`` does, without a kernel of the server."""

    def add(pair: LoraWeights, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        a, b = (half.to(x.device, x.dtype) for half in (pair.a, pair.b))
        return output + (x @ a.t()) @ b

    with _hooked(model, {name: partial(add, pair) for name, pair in adapter.weights.items()}):
        yield


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
