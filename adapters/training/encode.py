"""Conversations → token ids, with the assistant's tokens marked. Imports no torch.

How a conversation becomes tokens is ``adapters.text``'s, as for serving: an answer is learnt behind the very
tokens that are served as its prompt, and no token spans the place where generation begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from adapters.errors import DatasetInvalid, LineProblem, RecipeInvalid
from adapters.text.messages import Message
from adapters.text.renderer import ChatRenderer, Turn
from adapters.text.template import TemplateRefused
from adapters.training.dataset import Dataset, Row

Tick = Callable[[int], object]


@dataclass(slots=True)
class Example:
    """One sequence of tokens; attention never leaves it.

    Attributes:
        ids: token ids.
        learnt: for each token, whether the loss asks for it (never for the first).
    """

    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)

    def add(self, piece: Sequence[int], learnt: bool) -> None:
        self.ids += piece
        self.learnt += [learnt] * len(piece)

    def truncated(self, length: int) -> Example:
        return Example(self.ids[:length], self.learnt[:length])

    @property
    def trained(self) -> int:
        """How many tokens the loss asks for."""
        return sum(self.learnt)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set, ready to be learnt.

    Attributes:
        rows: conversations.
        truncated: examples that were cut at the longest sequence allowed.
    """

    examples: list[Example]
    rows: int
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(example.trained for example in self.examples)

    def summary(self, format_: str) -> str:
        """One line for people."""
        share = self.trained_tokens / self.tokens
        return (
            f"{self.rows} rows ({format_}), {self.tokens} tokens, {self.truncated} truncated, "
            f"{self.trained_tokens} trained tokens ({share:.0%})"
        )


class _Unrenderable(Exception):
    """Completes "line 7 …"."""


def encode_dataset(
    dataset: Dataset,
    renderer: ChatRenderer | None,
    eos: frozenset[int],
    max_length: int,
    tick: Tick = lambda _: None,
) -> Encoded:
    """Every row of ``dataset`` as examples of at most ``max_length`` tokens.

    Args:
        renderer: the base's; None = it has no chat template.
        eos: the token ids that end an answer.
        tick: called after each row, with 1.

    Raises:
        RecipeInvalid: the base has no chat template.
        DatasetInvalid: the template refuses rows, or cutting them leaves nothing to learn.
    """
    if renderer is None:
        raise RecipeInvalid("The base has no chat template; train on its instruction-tuned version.")
    examples: list[Example] = []
    problems: list[LineProblem] = []
    truncated = 0
    for row in dataset.rows:
        try:
            for example in _checked(encode_row(row, renderer, eos), max_length):
                truncated += len(example.ids) > max_length
                examples.append(example.truncated(max_length))
        except _Unrenderable as problem:
            problems.append(LineProblem(row.line, str(problem)))
        tick(1)
    if problems:
        raise DatasetInvalid(dataset.path.name, problems)
    return Encoded(examples, len(dataset.rows), truncated)


def _checked(examples: Iterator[Example], max_length: int) -> Iterator[Example]:
    for example in examples:
        if not any(example.learnt[:max_length]):
            begins = example.learnt.index(True)
            raise _Unrenderable(
                f"has {begins} tokens before the first that is learnt, more than --max-seq-len {max_length}"
            )
        yield example


def encode_row(row: Row, renderer: ChatRenderer, eos: frozenset[int]) -> Iterator[Example]:
    """The row's examples: one, if each prompt is served as the turns before it were learnt.

    Else each answer is an example of its own, behind its prompt: templates of thinking models take the
    thoughts out of earlier turns, and templates that end no turn show earlier answers without their end.
    """
    example = Example()
    for place, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        turn = _turn(renderer, row.messages[: place + 1])
        if turn.prompt[: len(example.ids)] != example.ids:
            if any(example.learnt):
                yield example
            example = Example()
        example.add(turn.prompt[len(example.ids) :], False)
        example.add(_answer(turn, eos), place not in row.unlearnt)
    if any(example.learnt):
        yield example


def _turn(renderer: ChatRenderer, messages: list[Message]) -> Turn:
    try:
        return renderer.turn(messages)
    except TemplateRefused as error:
        raise _Unrenderable(f"is refused by the base's chat template ({error})") from error


def _answer(turn: Turn, eos: frozenset[int]) -> list[int]:
    """The answer's tokens; one that the template does not end gets the end that generation needs."""
    if turn.ended or (turn.answer and turn.answer[-1] in eos):
        return turn.answer
    return [*turn.answer, min(eos)]
