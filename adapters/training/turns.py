"""Reads the messages of one row, in OpenAI's or ShareGPT's fields. Pure Python, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.text.messages import REASONING_FIELDS, ROLES, Message, join_parts

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_CALLS = ("tool_calls", "function_call")


class RowInvalid(Exception):
    """The message completes "line 7 …"."""


@dataclass(slots=True)
class Turns:
    """A conversation while it is read.

    Attributes:
        unused: fields that the model does not see, with their path (``messages[].name``).
        context_only: indices of the assistant's messages that are only context.
    """

    unused: set[str]
    messages: list[Message] = field(default_factory=list)
    context_only: set[int] = field(default_factory=set)

    def append(self, role: str, text: str) -> None:
        """Append one message."""
        self.messages.append({"role": role, "content": text})

    def read(self, value: Any, name: str, learnt: bool = True) -> None:
        """The messages in the field ``name``. Raises RowInvalid."""
        for place, message in enumerate(list_of(value, name)):
            if not isinstance(message, dict):
                raise RowInvalid(f"{name}[{place}] must be an object")
            self._read_one(message, f"{name}[{place}]", f"{name}[]", learnt)

    def _read_one(self, message: Mapping[str, Any], where: str, anywhere: str, learnt: bool) -> None:
        role_key, text_key = ("role", "content") if is_chat(message) else ("from", "value")
        roles = ROLES if role_key == "role" else _SHAREGPT_ROLES
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise RowInvalid(f"{where}.{role_key} must be one of {', '.join(roles)}, not {role!r:.60}")
        if calls := [key for key in _CALLS if message.get(key)]:
            raise RowInvalid(f"{where} has {calls[0]}, which cannot be trained on; give messages of text")
        self.append(roles[role], text_of(message.get(text_key), f"{where}.{text_key}"))
        self._weigh(message.get("weight"), where, learnt)
        understood = {role_key, text_key, "weight", *_CALLS} | self._reason(message, where)
        self.unused |= {f"{anywhere}.{key}" for key in given(message) if key not in understood}
        self.unused |= {f"{anywhere}.{text_key}[].{key}" for key in _unused_in_parts(message[text_key])}

    def _reason(self, message: Mapping[str, Any], where: str) -> set[str]:
        """Read an assistant's reasoning. Returns the fields that hold it."""
        said = {key: message[key] for key in REASONING_FIELDS if isinstance(message.get(key), str)}
        if not said or self.messages[-1]["role"] != "assistant":
            return set()
        name, reasoning = next(iter(said.items()))
        self.messages[-1]["reasoning_content"] = _unicode(reasoning, f"{where}.{name}")
        return {key for key, text in said.items() if text == reasoning}

    def _weigh(self, weight: Any, where: str, learnt: bool) -> None:
        """Read OpenAI's ``weight``. An answer with weight 0 is only context."""
        answers = self.messages[-1]["role"] == "assistant"
        if weight not in (None, 0, 1) or (weight is not None and not answers):
            raise RowInvalid(f"{where}.weight must be 0 or 1, on an assistant message")
        if answers and (weight == 0 or not learnt):
            self.context_only.add(len(self.messages) - 1)


def is_chat(message: Mapping[str, Any]) -> bool:
    """Whether a message has OpenAI's fields, not ShareGPT's ``from`` and ``value``."""
    return "role" in message or "from" not in message


def given(fields: Mapping[str, Any]) -> Iterator[str]:
    """The fields that are not null."""
    return (name for name, value in fields.items() if value is not None)


def list_of(value: Any, where: str) -> list[Any]:
    """Raises RowInvalid."""
    if not isinstance(value, list):
        raise RowInvalid(f"{where} must be a list, not {_kind(value)}")
    return value


def text_of(value: Any, where: str) -> str:
    """A text, or OpenAI's list of text parts, that is not empty and that a tokenizer accepts.

    Raises RowInvalid.
    """
    if isinstance(value, list) and value:
        value = join_parts(_text_of_part(part, f"{where}[{place}]") for place, part in enumerate(value))
    if not isinstance(value, str):
        raise RowInvalid(f"{where} must be a text, not {_kind(value)}")
    if not value.strip():
        raise RowInvalid(f"{where} is empty")
    return _unicode(value, where)


def _unicode(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowInvalid(f"{where} has half of a surrogate pair, which is not valid Unicode")
    return text


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = f"type {part.get('type')!r:.60}" if isinstance(part, dict) else _kind(part)
    raise RowInvalid(f"{where} must be a text part, not {kind}; training uses only text")


def _unused_in_parts(content: Any) -> set[str]:
    parts = content if isinstance(content, list) else []
    return {name for part in parts for name in given(part) if name not in ("type", "text")}


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a text", "bool": "a boolean"}
    return names.get(type(value).__name__, "a number")
