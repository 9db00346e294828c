"""Wrappers around modules that adapters may replace: norms, the embedding, the output head.

Each computes the base's module for all rows, and then recomputes the rows of adapters that replace it. They
work on any transformers model. ``server/engine/model/cpu/model.py`` computes norms and head itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear

from adapters.kernels import LoraKernel, Segment
from adapters.layers.lora_state import LoraState
from adapters.pool.extras_pool import ResidentEmbeddingOrHead


class Wrapped(nn.Module):
    """Forwards unknown attributes to the wrapped module: some models read the weight of a linear."""

    def __init__(self, base: nn.Module, state: LoraState) -> None:
        super().__init__()
        self.base = base
        self._state = state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class ReplacedNorm(Wrapped):
    """x: [1, tokens, …]."""

    def __init__(self, base: nn.Module, name: str, state: LoraState) -> None:
        super().__init__(base, state)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for _, start, stop, extras in self._state.extras_segments:
            parameters = extras.norms.get(self._name)
            if parameters is not None:
                y[:, start:stop] = functional_call(self.base, dict(parameters), (x[:, start:stop],))
        return y


class ReplacedEmbedding(Wrapped):
    """ids: [1, tokens]; the result is [1, tokens, hidden]."""

    def __init__(self, base: nn.Module, state: LoraState, kernel: LoraKernel) -> None:
        super().__init__(base, state)
        self._kernel = kernel

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        rows, flat = y.view(-1, y.shape[-1]), ids.reshape(-1)
        for _, start, stop, extras in self._state.extras_segments:
            if extras.embedding is not None:
                rows[start:stop] = self._replaced(flat[start:stop], extras.embedding)
        return y

    def _replaced(self, ids: Tensor, replacement: ResidentEmbeddingOrHead) -> Tensor:
        weight: Any = self.base.weight if replacement.matrix is None else replacement.matrix
        rows = embedding(ids, weight)
        if replacement.pool is not None:
            x = rows[:, :0] if replacement.table is None else embedding(ids, replacement.table)
            self._kernel(rows, x, replacement.pool, [Segment(0, 0, len(ids))])
        scale: Tensor | None = getattr(self.base, "embed_scale", None)  # Gemma's embeddings have one
        return rows if scale is None else rows * scale.to(rows.dtype)


class ReplacedHead(Wrapped):
    """x: [1, rows, hidden]; the result is [1, rows, vocabulary]."""

    def __init__(self, base: nn.Module, state: LoraState, kernel: LoraKernel) -> None:
        super().__init__(base, state)
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for _, start, stop, extras in self._state.extras_head_rows:
            if extras.head is not None:
                self._replaced(y[0, start:stop], x[0, start:stop], extras.head)
        return y

    def _replaced(self, y: Tensor, x: Tensor, replacement: ResidentEmbeddingOrHead) -> None:
        if replacement.matrix is not None:
            bias: Any = self.base.bias
            y.copy_(linear(x, replacement.matrix, bias))
        if replacement.pool is not None:
            self._kernel(y, x, replacement.pool, [Segment(0, 0, len(x))])
