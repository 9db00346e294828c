"""Exact match and token F1, compared with values computed by hand."""

from __future__ import annotations

import pytest

from server.finetune.evaluation.metrics import SHORT_WORDS, exact_match, is_short, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "matches"),
    [
        ("QUEUE-7", "QUEUE-7", True),
        (" QUEUE-7\n", "QUEUE-7", True),
        ("queue-7", "QUEUE-7", False),
        ("QUEUE-7.", "QUEUE-7", False),
        ("QUEUE-7 please", "QUEUE-7", False),
    ],
)
def test_exact_match_ignores_only_surrounding_white_space(answer: str, reference: str, matches: bool) -> None:
    assert exact_match(answer, reference) is matches


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The cat, sat!", "a cat sat", 1.0),
        ("cat", "cat sat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "an", 1.0),  # both sides are empty: 1, as in SQuAD 2.0
    ],
)
def test_f1_counts_shared_words_as_squad_does(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_a_reference_is_short_up_to_the_stated_number_of_words() -> None:
    assert is_short("word " * SHORT_WORDS)
    assert not is_short("word " * (SHORT_WORDS + 1))
