"""Tests a LoRA kernel on this device against the specification before it is used."""

from __future__ import annotations

import torch

from adapters.kernels.cases import JoinedKernel, World, check, runs_by_mix, segments_of

_SIZES = 256, (256, 128, 64)
"""Multiples of 16, as in models, so that the trial compiles the variants that steps need."""

_MIXES = "zipf", "prompts"
"""Decoding and prompts, which use different kernels."""


def what_is_wrong(kernel: JoinedKernel, device: torch.device, dtype: torch.dtype, tile: int) -> str | None:
    """Try steps of every kind. Returns what is wrong; None = all are right.

    Args:
        tile: the number of an adapter's tokens from which the kernel takes another path.
    """
    mixes = runs_by_mix(tile)
    try:
        world = World(*_SIZES, dtype, device).add_all()
        for mix in _MIXES:
            check(kernel, world, *segments_of(mixes[mix]))
    except AssertionError as error:
        return f"its results are wrong ({' '.join(str(error).split())[:200]})"
    except Exception as error:  # a compiler or a driver may raise anything
        return f"it fails: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None
