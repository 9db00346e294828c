"""Converts held-out rows to requests: passages, whose tokens are scored, and questions with an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.text.chat_format import ChatFormat
from adapters.text.renderer import ChatRenderer
from adapters.training.dataset import Dataset, Row
from adapters.training.encode import Example, encode_dataset
from server.engine.tokenizer import Tokenizer
from server.finetune.evaluation.errors import EvaluationFailed
from server.finetune.evaluation.metrics import is_short
from server.finetune.evaluation.scoring import Targets

_LEAST_ANSWER_TOKENS = 64
_ANSWER_TO_REFERENCE = 2


@dataclass(frozen=True, slots=True)
class Passage:
    """A conversation without its last learnt token and what follows it.

    Attributes:
        targets: the learnt tokens, by the position before each.
    """

    tokens: tuple[int, ...]
    targets: Targets


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose greedy answer is compared with a short reference.

    Attributes:
        line: the line of the row in its file.
        max_tokens: the longest answer. It is much longer than the reference, so that only wrong ones are cut.
    """

    line: int
    prompt: tuple[int, ...]
    reference: str
    max_tokens: int


def make_passages(data: Dataset, chat_format: ChatFormat, max_model_len: int) -> list[Passage]:
    """All rows, encoded as in training and cut at ``max_model_len`` tokens.

    Raises:
        TrainingError: the chat template refuses rows, or no answer of a row fits.
    """
    encoded = encode_dataset(data, chat_format.renderer, chat_format.eos, max_model_len)
    return [_passage(example) for example in encoded.examples]


def _passage(example: Example) -> Passage:
    places = [place for place, learnt in enumerate(example.learnt) if learnt]
    targets = {place - 1: example.ids[place] for place in places}
    return Passage(tuple(example.ids[: places[-1]]), targets)


def make_questions(
    rows: Sequence[Row], tokenizer: Tokenizer, chat_format: ChatFormat, max_model_len: int
) -> list[Question]:
    """The last question of every row whose last reference is short and learnt.

    Raises:
        EvaluationFailed: a question leaves no room for an answer in ``max_model_len`` tokens, or the base has
            no chat template.
    """
    asked = [
        row
        for row in rows
        if is_short(row.messages[-1]["content"]) and len(row.messages) - 1 not in row.context_only
    ]
    if chat_format.renderer is None:
        raise EvaluationFailed("The base has no chat template; evaluate its instruction-tuned version.")
    questions = [_question(row, chat_format.renderer, tokenizer) for row in asked]
    for question in questions:
        if len(question.prompt) >= max_model_len:
            raise EvaluationFailed(
                f"The question at line {question.line} has {len(question.prompt)} tokens; the context has "
                f"{max_model_len} for question and answer. Shorten it or remove it from the evaluation data."
            )
    return questions


def _question(row: Row, renderer: ChatRenderer, tokenizer: Tokenizer) -> Question:
    reference = row.messages[-1]["content"]
    return Question(
        line=row.line,
        prompt=tuple(renderer.prompt(row.messages[:-1])),
        reference=reference,
        max_tokens=max(_LEAST_ANSWER_TOKENS, _ANSWER_TO_REFERENCE * len(tokenizer.encode(reference))),
    )
