"""The LoRA layer: ``base(x) + lora(x)`` around each of the base's linears, for a batch of mixed adapters.

``attach`` inserts it. The assignment of tokens to adapters changes with every step and is the same for all
layers, so they share one ``LoraState``.
"""

from __future__ import annotations

from torch import Tensor, nn

from adapters.kernels import LoraKernel
from adapters.layers.lora_state import LoraState
from adapters.layers.replaced import ReplacedEmbedding, ReplacedHead, ReplacedNorm, Wrapped
from adapters.pool.rank_pool import RankPool
from adapters.pool.site_pool import SitePool
from adapters.sites import BaseLayout


class LoraLinear(Wrapped):
    """y_t = W x_t + sum over j in rows(adapter of t) of (A_j . x_t) B_j; x is [1, tokens, in_features].

    For adapters with an adjustment, W x_t is scaled and shifted first.
    """

    def __init__(self, base: nn.Module, pool: SitePool, state: LoraState, kernel: LoraKernel) -> None:
        super().__init__(base, state)
        self._pool = pool
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._state.segments:
            rows, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            if len(rows) != self._state.tokens:  # it is unknown which token each row belongs to
                raise ValueError(f"a linear got {len(rows)} rows in a step of {self._state.tokens} tokens")
            self._kernel(rows, inputs, self._pool, self._state.segments)
        return y


def attach(model: nn.Module, layout: BaseLayout, pool: RankPool, kernel: LoraKernel) -> LoraState:
    """Wrap every site of ``pool`` in ``model``, and the modules that adapters may replace.

    All wrappers read the returned state.
    """
    state = LoraState(pool.extras)
    for name, site_pool in pool.sites.items():
        _swap(model, name, LoraLinear(model.get_submodule(name), site_pool, state, kernel))
    for name in pool.extras.norms:
        _swap(model, name, ReplacedNorm(model.get_submodule(name), name, state))
    for site, wrapper in ((layout.embedding, ReplacedEmbedding), (layout.head, ReplacedHead)):
        if site is not None:
            _swap(model, site.name, wrapper(model.get_submodule(site.name), state, kernel))
    return state


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
