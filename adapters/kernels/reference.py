"""The specification, readable and slow: one token, one row at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.kernels import Segment
from adapters.rank_pool import SitePool


def reference_lora(y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
    """See ``adapters/kernels/__init__.py``."""
    every_row = torch.arange(pool.a.shape[0])
    for slot, start, stop in segments:
        if slot not in pool.rows:
            continue
        for t in range(start, stop):
            total = y[t].float()
            for j in every_row[pool.rows[slot]].tolist():
                total += (pool.a[j].float() @ x[t].float()) * pool.b[j].float()
            y[t] = total.to(y.dtype)
