"""How a measurement cannot take place at all. A request that fails is no such error, but a figure."""

from __future__ import annotations

from adapters.errors import ManyloraError


class BenchError(ManyloraError):
    """A contradictory command, or a server or peer that did not start or has ended."""
