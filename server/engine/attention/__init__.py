"""Attention over paged keys and values.

``plan.py`` turns a step's chunks into index tensors, once a step; a backend uses them in every layer.
``AttentionBackend`` is the interface, ``torch_paged.py`` the one that runs everywhere.

The model's own attention modules call the function that ``install`` registers with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from adapters.errors import BaseModelError
from server.engine.attention.plan import AttentionPlan

NAME = "manylora"
"""The name under which the function is registered with transformers."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What is fixed for a layer.

    Attributes:
        scale: multiplies q.k.
        window: a query sees so many latest tokens, itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap); None = left as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(Protocol):
    """Computes one layer's attention for one step."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        layer: LayerAttention,
    ) -> Tensor:
        """Store the new k and v, then attend.

        Args:
            q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim].
            cache: the layer's keys and values, each [kv_slots, kv_heads, head_dim].

        Returns:
            [tokens, heads, head_dim of v].
        """


class AttentionHost:
    """Where the model's attention calls arrive; the runner sets ``handler`` for what is under way."""

    def __init__(self) -> None:
        self.handler: Callable[[int, Tensor, Tensor, Tensor, LayerAttention], Tensor] | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
        for name in ("s_aux", "head_mask", "position_bias"):
            if others.get(name) is not None:
                raise BaseModelError(f"This model's attention needs {name!r}, which is not supported yet.")
        assert self.handler is not None
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        layer = LayerAttention(scale, sliding_window, softcap)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.handler(int(module.layer_idx), q, k, v, layer).unsqueeze(0), None  # type: ignore[arg-type]


def install(model: nn.Module) -> AttentionHost:
    """Route ``model``'s attention through a fresh host.

    Raises:
        BaseModelError: if the model does not use transformers' attention interface.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not getattr(model, "_supports_attention_backend", False):
        raise BaseModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot be served."
        )
    host = AttentionHost()
    name = f"{NAME}-{id(host):x}"
    ALL_ATTENTION_FUNCTIONS.register(name, host)
    model.set_attn_implementation(name)  # type: ignore[operator]
    return host
