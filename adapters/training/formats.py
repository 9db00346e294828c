"""The row formats of training data, each converted to chat messages. Pure Python, no files.

OpenAI chat, prompt/completion, and the Alpaca and ShareGPT columns as LLaMA-Factory reads them
(https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.text.messages import Message
from adapters.training.turns import RowInvalid, Turns, given, is_chat, list_of, text_of

_UNLEARNABLE = ("tools", "functions", "images", "videos", "audios", "kto_tag", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row.

    Attributes:
        context_only: indices of the assistant's messages that are only context.
        unused: fields that the model does not see, with their path (``messages[].name``).
    """

    messages: list[Message]
    context_only: frozenset[int] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def reasons(self) -> bool:
        """Whether it has the assistant's reasoning, which only some chat templates use."""
        return any("reasoning_content" in message for message in self.messages)


def _always(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Attributes:
        name: the name for messages.
        required: the fields that identify the format.
        optional: further known fields.
        read: reads a row into turns; raises RowInvalid.
        suits: distinguishes it from another format with the same fields.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Mapping[str, Any], Turns], None]
    suits: Callable[[Mapping[str, Any]], bool] = _always

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return self.required <= row.keys() and self.suits(row)


def detect(row: Mapping[str, Any]) -> Format:
    """The format of a row by its fields. Raises RowInvalid."""
    for candidate in FORMATS:
        if candidate.recognises(row):
            return candidate
    known = "; ".join(f"{', '.join(sorted(one.required))} ({one.name})" for one in FORMATS)
    fields = ", ".join(sorted(row)) or "none"
    raise RowInvalid(f"has the fields {fields:.200}, but needs those of one format: {known}")


def read_conversation(row: Mapping[str, Any], format_: Format) -> Conversation:
    """The row's conversation, complete and in a valid order of roles. Raises RowInvalid."""
    if refused := [field for field in _UNLEARNABLE if row.get(field)]:
        raise RowInvalid(f"has {refused[0]!r}, which cannot be trained on; give rows that contain only text")
    turns = Turns(set(given(row)) - format_.required - format_.optional - set(_UNLEARNABLE))
    format_.read(row, turns)
    conversation = Conversation(turns.messages, frozenset(turns.context_only), frozenset(turns.unused))
    _check_order(conversation)
    return conversation


def _check_order(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    if "system" in roles[1:]:
        raise RowInvalid("has a system message that is not the first")
    if "assistant" not in roles:
        raise RowInvalid("has no assistant message to learn from")
    if "user" not in roles[: roles.index("assistant")]:
        raise RowInvalid("has an assistant message before any user message")
    if roles[-1] != "assistant":
        raise RowInvalid(f"ends with a {roles[-1]} message; the last must be the assistant's")
    if conversation.context_only >= {turn for turn, role in enumerate(roles) if role == "assistant"}:
        raise RowInvalid("gives every assistant message weight 0, so there is nothing to learn from")


def _chat(row: Mapping[str, Any], turns: Turns) -> None:
    turns.read(row["messages"], "messages")


def _conversations(row: Mapping[str, Any], turns: Turns) -> None:
    _system(row, turns)
    turns.read(row["conversations"], "conversations")


def _prompt_completion(row: Mapping[str, Any], turns: Turns) -> None:
    """Read like TRL: the assistant's messages in the prompt are only context."""
    for field, role in {"prompt": "user", "completion": "assistant"}.items():
        if isinstance(row[field], list):
            turns.read(row[field], field, learnt=field == "completion")
        else:
            turns.append(role, text_of(row[field], field))


def _alpaca(row: Mapping[str, Any], turns: Turns) -> None:
    _system(row, turns)
    for place, pair in enumerate(list_of(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowInvalid(f"history[{place}] must be a pair [instruction, answer]")
        turns.append("user", text_of(pair[0], f"history[{place}][0]"))
        turns.append("assistant", text_of(pair[1], f"history[{place}][1]"))
    question = text_of(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + text_of(row["input"], "input")
    turns.append("user", question)
    turns.append("assistant", text_of(row["output"], "output"))


def _system(row: Mapping[str, Any], turns: Turns) -> None:
    if row.get("system"):
        turns.append("system", text_of(row["system"], "system"))


def _has_roles(row: Mapping[str, Any]) -> bool:
    """Whether the first of ``conversations`` has OpenAI's fields, as in many files on the hub."""
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and is_chat(turns[0])


FORMATS = (
    Format("OpenAI chat", frozenset({"messages"}), frozenset(), _chat),
    Format("OpenAI chat", frozenset({"conversations"}), frozenset({"system"}), _conversations, _has_roles),
    Format("ShareGPT", frozenset({"conversations"}), frozenset({"system"}), _conversations),
    Format(
        "Alpaca", frozenset({"instruction", "output"}), frozenset({"input", "system", "history"}), _alpaca
    ),
    Format("prompt/completion", frozenset({"prompt", "completion"}), frozenset(), _prompt_completion),
)
