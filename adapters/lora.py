"""The layer: ``base(x) + lora(x)`` around each of the base's linears, for a batch of mixed adapters.

``attach`` swaps it in. Which tokens belong to which adapter changes with every step and is the same for
every layer, so it lives in one ``LoraState`` that the layers share.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.kernels import LoraKernel, Segment
from adapters.rank_pool import RankPool, SitePool


@dataclass(slots=True)
class LoraState:
    """What the step under way needs to know.

    Attributes:
        segments: runs of tokens that use the same adapter, in order, without base tokens.
    """

    segments: list[Segment]


class LoraLinear(nn.Module):
    """y_t = W x_t + sum over j in rows(adapter of t) of (A_j . x_t) B_j; x is [1, tokens, in_features]."""

    def __init__(self, base: nn.Module, pool: SitePool, state: LoraState, kernel: LoraKernel) -> None:
        super().__init__()
        self.base = base
        self._pool = pool
        self._state = state
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._state.segments:
            self._kernel(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), self._pool, self._state.segments)
        return y


def attach(model: nn.Module, pool: RankPool, kernel: LoraKernel) -> LoraState:
    """Wrap every site of ``pool`` in ``model``; the returned state steers them all."""
    state = LoraState(segments=[])
    for name, site_pool in pool.sites.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoraLinear(owner.get_submodule(child), site_pool, state, kernel))
    return state
