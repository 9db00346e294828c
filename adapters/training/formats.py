"""The row formats that training data comes in, each turned into chat messages. Pure Python, no files.

OpenAI chat, prompt/completion, and the Alpaca and ShareGPT columns as LLaMA-Factory reads them
(https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.text.messages import Message, join_parts

_CHAT_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_UNLEARNABLE = ("tools", "functions", "images", "videos", "audios", "kto_tag", "chosen", "rejected")


class RowInvalid(Exception):
    """The message completes "line 7 …"."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its messages, and which of the assistant's are not learnt (OpenAI's ``weight`` 0)."""

    messages: list[Message]
    unlearnt: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Attributes:
        name: as stated to people.
        required: the fields by which a row is recognised.
        optional: the further fields that are understood.
        read: turns a row into a conversation; raises RowInvalid.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Mapping[str, Any]], Conversation]

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return self.required <= row.keys()


def detect(row: Mapping[str, Any]) -> Format:
    """The format of a row by its fields. Raises RowInvalid."""
    for candidate in FORMATS:
        if candidate.recognises(row):
            return candidate
    known = "; ".join(f"{', '.join(sorted(one.required))} ({one.name})" for one in FORMATS)
    fields = ", ".join(sorted(row)) or "none"
    raise RowInvalid(f"has the fields {fields:.200}, but needs those of one format: {known}")


def read_conversation(row: Mapping[str, Any], format_: Format) -> Conversation:
    """The row's conversation, complete and in an order that can be learnt. Raises RowInvalid."""
    if refused := [field for field in _UNLEARNABLE if row.get(field)]:
        raise RowInvalid(f"has {refused[0]!r}, which cannot be trained on; give rows of text alone")
    conversation = format_.read(row)
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
    if conversation.unlearnt >= {turn for turn, role in enumerate(roles) if role == "assistant"}:
        raise RowInvalid("gives every assistant message weight 0, so there is nothing to learn from")


def _chat(row: Mapping[str, Any]) -> Conversation:
    messages = list(_messages(row["messages"], "messages", "role", "content", _CHAT_ROLES))
    weights = [message.get("weight") for message in row["messages"]]
    for turn, weight in enumerate(weights):
        if weight not in (None, 0, 1) or (weight is not None and messages[turn]["role"] != "assistant"):
            raise RowInvalid(f"messages[{turn}].weight must be 0 or 1, on an assistant message")
    return Conversation(messages, frozenset(turn for turn, weight in enumerate(weights) if weight == 0))


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    pair = {"prompt": "user", "completion": "assistant"}
    messages: list[Message] = []
    for field, role in pair.items():
        value = row[field]
        if isinstance(value, list):  # TRL's conversational form
            messages += _messages(value, field, "role", "content", _CHAT_ROLES)
        else:
            messages.append({"role": role, "content": _text(value, field)})
    return Conversation(messages)


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    messages = _system(row)
    for turn, pair in enumerate(_list(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowInvalid(f"history[{turn}] must be a pair [instruction, answer]")
        messages.append({"role": "user", "content": _text(pair[0], f"history[{turn}][0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"history[{turn}][1]")})
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n" + _text(row["input"], "input")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return Conversation(messages)


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = _messages(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)
    return Conversation([*_system(row), *turns])


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []


def _messages(
    value: Any, field: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> Iterator[Message]:
    for turn, message in enumerate(_list(value, field)):
        where = f"{field}[{turn}]"
        if not isinstance(message, dict):
            raise RowInvalid(f"{where} must be an object")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise RowInvalid(f"{where}.{role_key} must be one of {', '.join(roles)}, not {role!r:.60}")
        if calls := [key for key in ("tool_calls", "function_call") if message.get(key)]:
            raise RowInvalid(f"{where} has {calls[0]}, which cannot be trained on; give messages of text")
        yield {"role": roles[role], "content": _text(message.get(text_key), f"{where}.{text_key}")}


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowInvalid(f"{field} must be a list, not {_kind(value)}")
    return value


def _text(value: Any, field: str) -> str:
    """A text, or OpenAI's list of text parts, with something in it that a tokenizer can take."""
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        value = join_parts(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowInvalid(f"{field} must be a text, not {_kind(value)}")
    if not value.strip():
        raise RowInvalid(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RowInvalid(f"{field} has half of a surrogate pair, which is no Unicode text")
    return value


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a text", "bool": "a boolean"}
    return names.get(type(value).__name__, "a number")


FORMATS = (
    Format("OpenAI chat", frozenset({"messages"}), frozenset(), _chat),
    Format("ShareGPT", frozenset({"conversations"}), frozenset({"system"}), _sharegpt),
    Format(
        "Alpaca", frozenset({"instruction", "output"}), frozenset({"input", "system", "history"}), _alpaca
    ),
    Format("prompt/completion", frozenset({"prompt", "completion"}), frozenset(), _prompt_completion),
)
