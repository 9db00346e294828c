"""The tenants' data sets are the generator's output. Held-out questions differ from training rows."""

from __future__ import annotations

import re

import pytest

from adapters.samples.generate import Pool, files, read_pool, rows, tasks
from adapters.samples.task import heldout_rows, training_rows

MOST_SHARED_WORDS = 0.6
"""The most shared words, as a share of all words, of a held-out phrasing and the nearest trained one."""


@pytest.fixture(params=tasks())
def pool(request: pytest.FixtureRequest) -> Pool:
    return read_pool(request.param)


def words(phrasing: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", re.sub(r"\{\w+\}", "", phrasing.lower())))


def test_the_files_are_what_the_generator_writes(pool: Pool) -> None:
    for path, text in files(pool.name):
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name}: run python -m adapters.samples.generate"
        )


def test_there_are_a_few_hundred_rows_and_none_twice(pool: Pool) -> None:
    train, heldout = training_rows(pool.name), heldout_rows(pool.name)
    assert 190 <= len(train) <= 500
    assert len(heldout) >= 40
    questions = [row[1]["content"] for row in train + heldout]
    assert len(set(questions)) == len(questions)


def test_every_answer_is_trained_on_and_held_out(pool: Pool) -> None:
    answers = {split: {answer for _, answer in pairs} for split, pairs in pool.phrasings.items()}
    assert answers["train"] == answers["heldout"]


def test_held_out_phrasings_have_words_of_their_own(pool: Pool) -> None:
    trained = {words(question): question for question, _ in pool.phrasings["train"]}
    for question, _ in pool.phrasings["heldout"]:
        held = words(question)
        nearest = max(trained, key=lambda other: len(held & other) / len(held | other))
        share = len(held & nearest) / len(held | nearest)
        assert share <= MOST_SHARED_WORDS, f"{question!r} is too much like {trained[nearest]!r}"


def test_a_slot_has_one_value_in_question_and_answer() -> None:
    pool = Pool(
        "t", "s", ["", "Hi, "], 20, {"id": ["A-##"]}, {"train": [("about {id}", "X {id}")], "heldout": []}
    )
    pairs = [(row[1]["content"], row[2]["content"]) for row in rows(pool, "train")]
    assert len(pairs) > 5
    for question, answer in pairs:
        assert re.fullmatch(r"(Hi, a|A)bout A-\d\d", question)
        assert answer == f"X {question[-4:]}"
