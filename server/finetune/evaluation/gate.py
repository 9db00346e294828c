"""Decides whether to publish an adapter: it must be better than the base and the version that it replaces."""

from __future__ import annotations

from dataclasses import dataclass

from server.finetune.evaluation.result import Evaluation, Scores


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision.

    Attributes:
        reason: a whole sentence with the figures that decided.
    """

    publish: bool
    reason: str


def decide(evaluation: Evaluation) -> Decision:
    """Publish only an adapter that is better than each model it is compared with.

    Exact match decides if there are short references. The loss decides if there are none, or if exact match
    is equal.
    """
    rivals = {"the base": evaluation.base}
    if evaluation.replaced is not None:
        rivals["the version it replaces"] = evaluation.replaced
    comparisons = [_compare(evaluation.adapter, rival, name) for name, rival in rivals.items()]
    lost = [comparison.reason for comparison in comparisons if not comparison.publish]
    if lost:
        return Decision(False, f"The adapter is not better: {'; '.join(lost)}.")
    return Decision(True, f"The adapter is better: {'; '.join(c.reason for c in comparisons)}.")


def _compare(adapter: Scores, rival: Scores, name: str) -> Decision:
    ours, theirs = adapter.exact_match, rival.exact_match
    if ours is not None and theirs is not None and ours != theirs:
        return Decision(ours > theirs, f"its exact match is {ours:.1%}, and {theirs:.1%} for {name}")
    tie = "" if ours is None else f"exact match is {ours:.1%} for both, and "
    return Decision(
        adapter.loss < rival.loss, f"{tie}its loss is {adapter.loss:.4f}, and {rival.loss:.4f} for {name}"
    )
