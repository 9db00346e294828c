"""Two matrix products a segment, with torch's own kernels; right on every device.

Neighbouring rows are read in place; scattered ones are gathered first.
"""

from __future__ import annotations

from torch import Tensor

from adapters.kernels import Segment
from adapters.rank_pool import SitePool


def segmented_lora(y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
    """See ``adapters/kernels/__init__.py``."""
    for slot, start, stop in segments:
        rows = pool.rows.get(slot)
        if rows is None:
            continue
        inner = x[start:stop] @ pool.a[rows].t()
        y[start:stop].addmm_(inner, pool.b[rows])
