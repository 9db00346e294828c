"""Reads a model's masks while it is probed: which earlier tokens each layer sees.

Models describe their masks to transformers as functions of positions (``masking_utils``), and transformers
applies nothing but the mask with its own sdpa and eager attention. So the function decides, not the layer's
``sliding_window``. It is evaluated at a few positions of the longest sequence, without its large mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, eager_mask

from adapters.errors import BaseModelError
from server.engine.attention import OWN_MASK

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether a query sees a key: (batch, head, query, key) -> bool, in positions that broadcast."""


class MaskReader:
    """Stands in for transformers' mask functions while a model is probed.

    Args:
        longest: tokens of the longest sequence; wider windows than this count as none.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._made: dict[int, tuple[Tensor, MaskFunction]] = {}
        self._window = cache(self._window_of)

    def __call__(
        self, *args: Any, mask_function: MaskFunction = causal_mask_function, **options: Any
    ) -> Tensor:
        """transformers' mask interface. The mask itself is transformers' own for eager attention."""
        options["allow_is_bidirectional_skip"] = False  # None would look like causal attention
        mask: Tensor = eager_mask(*args, mask_function=mask_function, **options)
        self._made[mask.data_ptr()] = mask, mask_function
        return mask

    def window(self, mask: Tensor | None, stated: int | None) -> int | None:
        """The window of a layer that attends with ``mask``, which may be a part of a mask made here.

        Args:
            stated: the window that the layer states itself. It holds where no mask decides.

        Raises:
            BaseModelError: the mask is not that of causal attention.
        """
        if mask is None:
            return stated
        if mask.data_ptr() not in self._made:
            raise BaseModelError(OWN_MASK)
        return self._window(mask.data_ptr(), stated)

    def _window_of(self, address: int, stated: int | None) -> int | None:
        made, function = self._made[address]
        try:
            return window_of(function, self._longest, made.device)
        except (RuntimeError, IndexError):  # it knows the positions of this step only, as those of images
            window_of(function, made.shape[-1], made.device)
            return stated


def window_of(mask_function: MaskFunction, longest: int, device: torch.device | str = "cpu") -> int | None:
    """The window of ``mask_function`` in sequences of ``longest`` tokens; None = all earlier tokens are seen.

    Raises:
        BaseModelError: the mask is not that of causal attention, with or without a window.
    """
    keys = torch.arange(longest, device=device)
    window = int(_seen(mask_function, longest - 1, keys).sum())
    for query in {0, 1, window - 1, window, window + 1, longest // 3, longest // 2, longest - 2, longest - 1}:
        wanted = (keys <= query) & (keys > query - window)
        if 0 <= query < longest and not torch.equal(_seen(mask_function, query, keys), wanted):
            raise BaseModelError("its attention mask is neither causal nor that of a sliding window.")
    return None if window == longest else window


def _seen(mask_function: MaskFunction, query: int, keys: Tensor) -> Tensor:
    """[keys] whether the token at ``query`` sees each key."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=keys.device)
    seen = mask_function(zero, zero, zero + query, keys[None, None, None])
    return seen.expand(1, 1, 1, len(keys)).flatten()
