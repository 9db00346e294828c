"""Whether a LoRA kernel does on this device what the specification says, tried before it is relied on."""

from __future__ import annotations

import torch

from adapters.kernels.cases import JoinedKernel, World, check, runs_by_mix, segments_of

_SIZES = 256, (256, 128, 64)
"""Multiples of 16, as models' are: so what is compiled for them is what steps need."""

_MIXES = "zipf", "prompts"
"""Decoding and prompts, which are computed by kernels of their own."""


def what_is_wrong(kernel: JoinedKernel, device: torch.device, dtype: torch.dtype, tile: int) -> str | None:
    """Try steps of every kind; None = all are right.

    Args:
        tile: tokens of one adapter from which the kernel takes another form.
    """
    mixes = runs_by_mix(tile)
    try:
        world = World(*_SIZES, dtype, device).add_all()
        for mix in _MIXES:
            check(kernel, world, *segments_of(mixes[mix]))
    except AssertionError as error:
        return f"its results are wrong ({' '.join(str(error).split())[:200]})"
    except Exception as error:  # a compiler's or a driver's: anything
        return f"it fails: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None
