"""Attention over paged keys and values.

``AttentionBackend`` is the interface. ``torch_paged.py`` runs everywhere, ``native_paged.py`` on CPUs,
``flash_paged.py`` on GPUs. ``choice.py`` chooses one.

The model's own attention modules call the function that ``install`` registers with transformers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from adapters.base.implementations import implementations_of, names_in
from adapters.errors import BaseModelError
from server.engine.sequence import Chunk

if TYPE_CHECKING:
    from server.engine.attention.masks import MaskReader

NAME = "manylora"
"""The name under which the function is registered with transformers."""

MAX_LAYERS = 1 << 16
"""Layers have lower numbers than this. A layer's second attention in a pass has this much more, and so on."""

OWN_MASK = "This model's attention adds a mask of its own, which is not supported."


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The fixed parameters of a layer's attention.

    Attributes:
        scale: multiplies q.k.
        window: the number of latest tokens that a query sees, itself included; None = all.
        softcap: scores become softcap * tanh(scores / softcap); None = unchanged.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class KvShape:
    """The shape of one layer's keys and values: the heads and their dimensions."""

    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class AttentionBackend(Protocol):
    """Owns the pages of all layers and attends over them.

    Attributes:
        name: for the log and ``/version``.
        graphable: whether steps may be captured in CUDA graphs, see ``begin``.
    """

    name: str
    graphable: bool

    def allocate(self, shapes: Mapping[int, KvShape], num_blocks: int) -> None:
        """Allocate ``num_blocks`` blocks of keys and of values for each layer."""

    def begin(self, chunks: Sequence[Chunk], graph_batch_size: int | None = None) -> None:
        """Start a step, whose tokens are the ``chunks``, one after the other.

        Args:
            graph_batch_size: None, unless ``graphable``. A number n makes a step of n tokens in n sequences
                for a CUDA graph. ``chunks`` are at most n, of one token each. The rest is padding: it writes
                and reads a spare block that no sequence owns, and its results mean nothing. Until the next
                ``begin``, every tensor that the kernels get besides q, k and v has the address and the shape
                that it had at the last ``begin`` with the same n. The numbers that they get are the same too.
                So what was captured after one ``begin(…, graph_batch_size=n)`` is replayed after another. It
                must run on the stream that ``begin`` was called on, because the one copy to the device is
                only queued.
        """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Store the new k and v, then attend.

        Args:
            q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim].

        Returns:
            [tokens, heads, head_dim of v].
        """


class AttentionHost:
    """Receives the model's attention calls and passes them to ``handler``, which the runner sets.

    Attributes:
        masks: reads the masks that the model passes, during its probe only. Later steps have none.
        windows: by layer, the window that the mask was found to have.
    """

    def __init__(self) -> None:
        self.handler: Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], Tensor] | None = None
        self.masks: MaskReader | None = None
        self.windows: dict[int, int | None] = {}
        self._calls: Counter[int] = Counter()

    def begin(self) -> None:
        """A forward pass begins."""
        self._calls.clear()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
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
        layer = self._number(int(module.layer_idx))  # type: ignore[arg-type]
        if self.masks is not None:
            self.windows[layer] = self.masks.window(attention_mask, sliding_window)
        elif attention_mask is not None:  # transformers makes none for us
            raise BaseModelError(OWN_MASK)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        spec = AttentionSpec(scale, self.windows.get(layer, sliding_window), softcap)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.handler(layer, q, k, v, spec).unsqueeze(0), None

    def _number(self, layer: int) -> int:
        """The number under which this call's keys and values are kept.

        A layer that attends several times in a pass has other keys or values each time.
        """
        self._calls[layer] += 1
        return layer + (self._calls[layer] - 1) * MAX_LAYERS


def install(model: nn.Module) -> AttentionHost:
    """Route ``model``'s attention through a new host.

    Raises:
        BaseModelError: if the model does not use transformers' attention interface.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise BaseModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot be served."
        )
    host = AttentionHost()
    _attend_with(model, f"{NAME}-{id(host):x}", host)
    return host


@contextmanager
def reading_masks(model: nn.Module, host: AttentionHost, longest: int) -> Iterator[None]:
    """While it lasts, transformers makes masks, and ``host`` reads them.

    Args:
        longest: tokens of the longest sequence.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from server.engine.attention.masks import MaskReader

    before = implementations_of(model.config)
    name = f"{NAME}-masks-{id(host):x}"
    host.masks = MaskReader(longest)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, host.masks)
    _attend_with(model, name, host)
    try:
        yield
    finally:
        host.masks = None
        model.set_attn_implementation(before)  # type: ignore[operator]
        for registry in (ALL_MASK_ATTENTION_FUNCTIONS, _attention_functions()):
            registry.register(name, None)


def _attend_with(model: nn.Module, name: str, host: AttentionHost) -> None:
    _attention_functions().register(name, host)
    model.set_attn_implementation(name)  # type: ignore[operator]


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def uninstall(model: nn.Module) -> None:
    """Unregister ``model``'s host, so that transformers does not keep its pages alive."""
    for name in names_in(implementations_of(model.config)):
        if name.startswith(f"{NAME}-"):
            _attention_functions().register(name, None)
