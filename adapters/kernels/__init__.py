"""The LoRA operation, with several backends.

    for each segment (slot, start, stop), with R = rows of that slot in the site's pool:
        y[start:stop] = scale * y[start:stop] + shift + (x[start:stop] @ A[R].T) @ B[R]

Shapes: y [tokens, out_features] (updated in place), x [tokens, in_features], A [rows, in_features],
B [rows, out_features], scale and shift [out_features] (the slot's ``Adjustment``, which few adapters have).
Slots with nothing at this site, and tokens outside all segments, are not changed.
``reference.py`` is the specification. Every backend equals it within its dtype's rounding.

The native and the Triton kernels also take several sites that share x in one call (``LoraCall`` in native.h,
``TritonLora.foreach``), for models that compute these sites in one projection.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapters.pool.site_pool import SitePool

log = logging.getLogger("manylora.adapters")


class Segment(NamedTuple):
    """Tokens [start, stop) use the adapter in ``slot``."""

    slot: int
    start: int
    stop: int


class LoraKernel(Protocol):
    """See the module's docstring."""

    def __call__(self, y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None: ...


def check_extents(y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
    """Check that a call stays within its tensors, because the kernels do not check bounds.

    Raises ValueError. Segments are in order.
    """
    tokens, inputs = x.shape
    stop = segments[-1].stop if segments else 0
    if tokens == y.shape[0] >= stop and inputs == pool.a.shape[1] and y.shape[1] == pool.b.shape[1]:
        return
    raise ValueError(
        f"LoRA on x {list(x.shape)} and y {list(y.shape)} at a site of {pool.a.shape[1]} inputs and "
        f"{pool.b.shape[1]} outputs, for tokens up to {stop}"
    )


def choose(device: torch.device, dtype: torch.dtype) -> LoraKernel:
    """The backend for this machine. It is chosen once, when the model is built."""
    import torch

    from adapters.kernels.cpu import library
    from adapters.kernels.segmented import segmented_lora

    if device.type == "cpu" and dtype == torch.bfloat16 and (native := library()) is not None:
        from adapters.kernels.cpu.lora import NativeLora

        return NativeLora(native)
    if device.type == "cuda" and find_spec("triton") is not None:
        from adapters.kernels.triton import TritonLora

        reason = _why_not_triton(device, dtype)
        if reason is None:
            return TritonLora(device)
        log.warning("LoRA runs without Triton, which is several times slower: %s", reason)
    return segmented_lora


@cache
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the Triton kernel on this device; None = nothing. It is tried once."""
    from adapters.kernels.trial import what_is_wrong
    from adapters.kernels.triton import TILE, TritonLora

    return what_is_wrong(TritonLora(device), device, dtype, TILE)
