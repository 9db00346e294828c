"""Checks whether rows fit into a context. Rows that clearly fit are not tokenised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from adapters.errors import DatasetInvalid, LineProblem
from adapters.text.renderer import ChatRenderer
from adapters.training.dataset import Dataset, Row

_BYTES_OF_TEMPLATE, _BYTES_OF_MESSAGE = 2048, 64
"""Upper bounds of what a chat template adds to a conversation, and to one message."""


def rows_that_may_not_fit(data: Dataset, longest: int) -> Iterator[Row]:
    """Rows that may have more than ``longest`` tokens. Each token has at least one byte."""
    for row in data.rows:
        texts = [text for message in row.messages for text in message.values()]
        size = sum(len(text.encode()) for text in texts) + _BYTES_OF_MESSAGE * len(row.messages)
        if size + _BYTES_OF_TEMPLATE > longest:
            yield row


def one_row_per_role_order(data: Dataset) -> Iterator[Row]:
    """One row for each order of roles. A template that refuses one row refuses all of its order."""
    known: set[tuple[str, ...]] = set()
    for row in data.rows:
        order = tuple(message["role"] for message in row.messages)
        if order not in known:
            known.add(order)
            yield row


def check_questions(
    held_out: Dataset, renderer: ChatRenderer, context: int, is_asked: Callable[[str], bool]
) -> None:
    """Raises DatasetInvalid if a question that is asked in the evaluation leaves no room for an answer.

    Args:
        context: tokens of question and answer.
        is_asked: whether a row with that reference is asked.
    """
    sizes = {
        row.line: len(renderer.prompt(row.messages[:-1]))
        for row in rows_that_may_not_fit(held_out, context)
        if is_asked(row.messages[-1]["content"])
    }
    problems = [
        LineProblem(
            line,
            f"has a question of {size} tokens, which leaves no room for an answer in "
            f"the context of {context}",
        )
        for line, size in sizes.items()
        if size >= context
    ]
    if problems:
        raise DatasetInvalid(held_out.path.name, problems)
