"""Two matrix products for each segment, with torch's kernels. Works on every device.

Adjacent rows are read in place. Scattered rows are gathered first.
"""

from __future__ import annotations

from torch import Tensor

from adapters.artifact import Adjustment
from adapters.kernels import Segment, check_extents
from adapters.pool.site_pool import Rows, SitePool


def segmented_lora(y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
    """See ``adapters/kernels/__init__.py``."""
    check_extents(y, x, pool, segments)
    for slot, start, stop in segments:
        rows, adjustment = pool.rows.get(slot), pool.adjustments.get(slot)
        if adjustment is not None:
            _adjusted(y[start:stop], x[start:stop], pool, rows, adjustment)
        elif rows is not None:
            inner = x[start:stop] @ pool.a[rows].t()
            y[start:stop].addmm_(inner, pool.b[rows])


def _adjusted(y: Tensor, x: Tensor, pool: SitePool, rows: Rows | None, adjustment: Adjustment) -> None:
    """Applies the adjustment in float32, and rounds once."""
    total = y.float()
    if adjustment.scale is not None:
        total *= adjustment.scale
    if adjustment.shift is not None:
        total += adjustment.shift
    if rows is not None:
        total += (x @ pool.a[rows].t()) @ pool.b[rows]
    y.copy_(total)
