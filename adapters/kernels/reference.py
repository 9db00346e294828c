"""The specification: readable, slow, in float32, with one token and one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.artifact import Adjustment
from adapters.kernels import Segment, check_extents
from adapters.pool.site_pool import SitePool

NONE = Adjustment(scale=None, shift=None)


def reference_lora(y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
    """See ``adapters/kernels/__init__.py``."""
    check_extents(y, x, pool, segments)
    every_row = torch.arange(pool.a.shape[0])
    for slot, start, stop in segments:
        adjustment = pool.adjustments.get(slot, NONE)
        for t in range(start, stop):
            total = y[t].float()
            if adjustment.scale is not None:
                total *= adjustment.scale
            if adjustment.shift is not None:
                total += adjustment.shift
            for j in every_row[pool.rows[slot]].tolist() if slot in pool.rows else ():
                total += (pool.a[j].float() @ x[t].float()) * pool.b[j].float()
            y[t] = total.to(y.dtype)
