"""Errors of an evaluation. Base, adapter and data also raise their own."""

from __future__ import annotations

from adapters.errors import ManyloraError


class EvaluationFailed(ManyloraError):
    """A row does not fit into the base's context, or the engine could not finish it."""
