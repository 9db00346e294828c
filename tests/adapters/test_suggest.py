"""Suggestions for mistyped names."""

from __future__ import annotations

from adapters.suggest import NEIGHBOURS, did_you_mean, near_names


def test_similar_names_are_found_the_most_similar_first() -> None:
    assert near_names("pirat", ["poet", "pirates", "pirate"]) == ["pirate", "pirates"]


def test_of_many_names_the_alphabetical_neighbours_are_compared() -> None:
    known = [f"support-{number:05}" for number in range(20 * NEIGHBOURS)]
    assert near_names("support-00500x", known, count=1) == ["support-00500"]


def test_a_long_name_is_not_compared() -> None:
    name = "x" * 1000
    assert near_names(name, [name]) == []


def test_a_sentence_ends_with_the_names_or_without_them() -> None:
    assert did_you_mean(["a", "b"]) == "; did you mean 'a' or 'b'?"
    assert did_you_mean([], otherwise=". Ask for a list.") == ". Ask for a list."
