"""The error of a measurement that cannot take place. A request that fails is counted, not raised."""

from __future__ import annotations

from adapters.errors import ManyloraError


class BenchError(ManyloraError):
    """Flags that contradict each other, or a server or peer that did not start or has ended."""
