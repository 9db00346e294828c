"""Linears that share an input, as one product with joined weights, and the LoRA of each.

One launch replaces several that are too small to keep a GPU busy. The base's own modules still work: their
weights become views of the joined ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

from adapters.kernels.triton import TritonLora
from adapters.layers.lora import LoraLinear
from adapters.layers.lora_state import LoraState
from adapters.pool.site_pool import SitePool
from server.engine.model.cuda.products import PRODUCTS, Choice, Nf4Weight
from server.engine.unsupported import Unsupported


class JoinedLinear:
    """y = x [W_1; W_2; …]^T + biases, plus the LoRA of the step's adapters for each part.

    Args:
        parts: the wrapped linears, by site; ``check_joinable`` must return None for them.
        pools: the rank rows of the same sites.
    """

    def __init__(
        self,
        parts: Mapping[str, LoraLinear],
        pools: Mapping[str, SitePool],
        state: LoraState,
        lora: TritonLora,
    ) -> None:
        bases: list[Any] = [part.base for part in parts.values()]
        self._pools = [pools[site] for site in parts]
        self._outputs = [base.out_features for base in bases]
        self._state, self._lora = state, lora
        self._nf4 = _Nf4(bases) if _state_of(bases[0]) is not None else None
        self._product = self._nf4 or _Dense(bases)
        self._bias = _join_biases(bases)

    @property
    def nf4(self) -> Nf4Weight | None:
        """The joined weights, if they are 4-bit."""
        return None if self._nf4 is None else self._nf4.weight

    def choose(self, choices: Mapping[tuple[int, int], Choice]) -> None:
        """Set the product to use, by (out_features, in_features) of 4-bit weights."""
        if self._nf4 is not None:
            self._nf4.choice = choices[self._nf4.weight.outputs, self._nf4.weight.inputs]

    def __call__(self, x: Tensor, adapted: bool) -> Tensor:
        """x [tokens, in_features] -> [tokens, sum of the parts' out_features].

        ``adapted``: whether any sequence in the step has an adapter.
        """
        y = self._product(x, self._bias)
        if adapted:
            self._lora.foreach(torch.split(y, self._outputs, 1), x, self._pools, self._state.segments)
        return y


def check_joinable(parts: Sequence[Any]) -> Unsupported | None:
    """Why these modules cannot be joined, or None.

    Args:
        parts: the base's own linears.
    """
    states = [_state_of(part) for part in parts]
    if all(state is None for state in states):
        plain = all(type(part) is Linear and part.weight.dtype == torch.bfloat16 for part in parts)
        return None if plain else Unsupported(f"its linears are {type(parts[0]).__name__}")
    if any(state is None or getattr(state, "packing_format_for_cpu", False) for state in states):
        return Unsupported("its linears are not all 4-bit in bitsandbytes' usual order")
    kinds = {(state.quant_type, state.blocksize) for state in states}
    if len(kinds) > 1 or parts[0].in_features % states[0].blocksize:
        return Unsupported("its 4-bit linears have blocks that cannot be joined")
    return None


class _Dense:
    def __init__(self, bases: Sequence[Any]) -> None:
        self._weight = torch.cat([base.weight.detach() for base in bases])
        for base, view in zip(
            bases, torch.split(self._weight, [len(base.weight) for base in bases]), strict=True
        ):
            base.weight.data = view

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self._weight, bias)


class _Nf4:
    """Multiplies by the quickest of several products (``products.py``).

    The scale of each 64 weights is float32 here, because 8-bit scales would need one offset for all parts. It
    takes 3 more bytes for each 64 weights.
    """

    def __init__(self, bases: Sequence[Any]) -> None:
        states = [_state_of(base) for base in bases]
        sizes = [base.weight.numel() for base in bases]
        packed = torch.cat([base.weight.detach().view(-1) for base in bases]).view(-1, 1)
        for base, view in zip(bases, torch.split(packed, sizes), strict=True):
            base.weight.data = view.view(base.weight.shape)
        self.weight = Nf4Weight(
            packed,
            torch.cat([_scales(state) for state in states]),
            states[0].code,
            sum(base.out_features for base in bases),
            bases[0].in_features,
            states[0].blocksize,
            states[0].quant_type,
        )
        self.choice = Choice()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return PRODUCTS[self.choice.of(len(x))](self.weight, x, bias)


def _state_of(base: Any) -> Any:
    return getattr(base.weight, "quant_state", None)


def _scales(state: Any) -> Tensor:
    """float32 [blocks], dequantised if they are nested."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        plain: Tensor = state.absmax
        return plain.flatten().float()
    scales: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.flatten().float()


def _join_biases(bases: Sequence[Any]) -> Tensor | None:
    """bf16 [all outputs]; zeros for the parts without a bias."""
    if all(base.bias is None for base in bases):
        return None
    biases = [
        torch.zeros(base.out_features, dtype=torch.bfloat16, device=base.weight.device)
        if base.bias is None
        else base.bias.detach().to(torch.bfloat16)
        for base in bases
    ]
    return torch.cat(biases)
