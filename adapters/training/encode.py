"""Conversations → token ids, with the assistant's tokens marked. Knows a tokenizer; imports no torch.

A prompt and its answer are tokenised apart, as they are when the model is served: no token ever spans the
place where generation begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import DatasetInvalid, LineProblem, RecipeInvalid
from adapters.training.dataset import Dataset, Message, Row

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
    dataset: Dataset, tokenizer: Any, eos: frozenset[int], max_length: int, tick: Tick = lambda _: None
) -> Encoded:
    """Every row of ``dataset`` as examples of at most ``max_length`` tokens.

    Args:
        tokenizer: the base's fast tokenizer.
        eos: the token ids that end an answer.
        tick: called after each row, with 1.

    Raises:
        RecipeInvalid: the base has no chat template.
        DatasetInvalid: the template refuses rows, or cutting them leaves nothing to learn.
    """
    if not tokenizer.chat_template:
        raise RecipeInvalid("The base has no chat template; train on its instruction-tuned version.")
    examples: list[Example] = []
    problems: list[LineProblem] = []
    truncated = 0
    for row in dataset.rows:
        try:
            for example in _checked(encode_row(row, tokenizer, eos), max_length):
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


def encode_row(row: Row, tokenizer: Any, eos: frozenset[int]) -> Iterator[Example]:
    """The row's examples: one, unless the template shows earlier turns otherwise than they were answered.

    (Templates of thinking models take the thoughts out of earlier turns: then each answer is an example of
    its own, behind the prompt that the server would render for it.)
    """
    example, done = Example(), ""
    for turn, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, row.messages[:turn], add_generation_prompt=True)
        whole = _render(tokenizer, row.messages[: turn + 1]).rstrip("\n")
        if not whole.startswith(prompt):
            raise _Unrenderable("is rendered by the base's chat template so that the answer has no place")
        if not prompt.startswith(done):
            if any(example.learnt):
                yield example
            example, done = Example(), ""
        example.add(_ids(tokenizer, prompt[len(done) :]), False)
        example.add(_answer(tokenizer, whole[len(prompt) :], message, eos), turn not in row.unlearnt)
        done = whole
    if any(example.learnt):
        yield example


def _answer(tokenizer: Any, text: str, message: Message, eos: frozenset[int]) -> list[int]:
    """The answer's tokens; a template that ends no turn gets the end that generation needs."""
    ids = _ids(tokenizer, text)
    if ids[-1] not in eos and text.endswith(message["content"].rstrip()):
        ids.append(min(eos))
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise what they like (jinja2's raise_exception)
        raise _Unrenderable(f"is refused by the base's chat template ({error})") from error
    return text
