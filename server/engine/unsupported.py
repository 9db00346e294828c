"""The reason why a fast way to run a model is not available."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Returned in place of a model, a kernel or a backend that this machine or this base cannot use.

    Attributes:
        reason: a clause for the log, such as "its linears are not packed NF4".
    """

    reason: str
