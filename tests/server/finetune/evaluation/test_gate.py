"""The gate: an adapter is published only if it is better than the base and the version it replaces."""

from __future__ import annotations

import pytest

from server.finetune.evaluation.gate import decide
from server.finetune.evaluation.result import Evaluation, Scores


def evaluation(adapter: Scores, base: Scores, replaced: Scores | None = None) -> Evaluation:
    return Evaluation(10, 100, 10, 1.0, base, adapter, replaced, ())


def scores(loss: float, exact: float | None) -> Scores:
    return Scores(loss, exact, exact)


@pytest.mark.parametrize(
    ("adapter", "base", "replaced", "publish"),
    [
        (scores(1.0, 0.9), scores(3.0, 0.0), None, True),
        (scores(5.0, 0.9), scores(3.0, 0.0), None, True),  # the exact match decides, not the loss
        (scores(1.0, 0.0), scores(3.0, 0.1), None, False),
        (scores(1.0, 0.5), scores(3.0, 0.5), None, True),  # a tie: the loss decides
        (scores(3.0, 0.5), scores(3.0, 0.5), None, False),  # no better at all
        (scores(1.0, None), scores(3.0, None), None, True),
        (scores(3.0, None), scores(1.0, None), None, False),
        (scores(float("nan"), None), scores(1.0, None), None, False),
        (scores(1.0, 0.8), scores(3.0, 0.0), scores(1.0, 0.9), False),
        (scores(1.0, 0.9), scores(3.0, 0.0), scores(1.0, 0.8), True),
        (scores(1.0, 0.9), scores(0.5, 0.95), scores(1.0, 0.8), False),
    ],
)
def test_it_must_be_better_than_every_rival(
    adapter: Scores, base: Scores, replaced: Scores | None, publish: bool
) -> None:
    assert decide(evaluation(adapter, base, replaced)).publish is publish


def test_the_reason_names_the_rival_and_the_figures() -> None:
    kept = decide(evaluation(scores(1.0, 0.8), scores(3.0, 0.0), scores(1.25, 0.8)))
    assert kept.reason == (
        "The adapter is better: its exact match is 80.0%, and 0.0% for the base; exact match is 80.0% for "
        "both, and its loss is 1.0000, and 1.2500 for the version it replaces."
    )
    refused = decide(evaluation(scores(1.0, 0.8), scores(3.0, 0.0), scores(1.0, 0.9)))
    assert refused.reason == (
        "The adapter is not better: its exact match is 80.0%, and 90.0% for the version it replaces."
    )
