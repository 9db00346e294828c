"""Converts conversations to token ids, with the assistant's tokens marked. Imports no torch.

``adapters.text`` tokenises conversations, as in serving. So an answer is learnt after exactly the tokens that
are served as its prompt, and no token spans the position where generation begins.
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
    """One sequence of tokens. Attention never crosses its bounds.

    Attributes:
        ids: token ids.
        learnt: for each token, whether it is in the loss (never the first).
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
        """The number of tokens in the loss."""
        return sum(self.learnt)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised data set.

    Attributes:
        rows: conversations.
        truncated: the number of examples that were cut at the longest allowed sequence.
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
        """One line of text about the data."""
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
        renderer: the base's renderer; None = it has no chat template.
        eos: the token ids that end an answer.
        tick: called with 1 after each row.

    Raises:
        RecipeInvalid: the base has no chat template.
        DatasetInvalid: the template refuses rows, or nothing to learn is left after cutting them.
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
                f"has {begins} tokens before the first learnt token, more than --max-seq-len {max_length}"
            )
        yield example


def encode_row(row: Row, renderer: ChatRenderer, eos: frozenset[int]) -> Iterator[Example]:
    """The row's examples: one, if each prompt in serving equals the earlier turns in training.

    Otherwise each answer is a separate example after its prompt. Templates of thinking models remove the
    thoughts of earlier turns, and templates without end tokens show earlier answers without their end.
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
        example.add(_answer(turn, eos), place not in row.context_only)
    if any(example.learnt):
        yield example


def _turn(renderer: ChatRenderer, messages: list[Message]) -> Turn:
    try:
        return renderer.turn(messages)
    except TemplateRefused as error:
        raise _Unrenderable(f"is refused by the base's chat template ({error})") from error


def _answer(turn: Turn, eos: frozenset[int]) -> list[int]:
    """The answer's tokens. If the template does not end it, the end token for generation is appended."""
    if turn.ended or (turn.answer and turn.answer[-1] in eos):
        return turn.answer
    return [*turn.answer, min(eos)]
