"""What can go wrong in an evaluation, beside what base, adapter and data raise themselves."""

from __future__ import annotations

from adapters.errors import ManyloraError


class EvaluationFailed(ManyloraError):
    """A row does not fit into the base's context, or the engine could not finish it."""
