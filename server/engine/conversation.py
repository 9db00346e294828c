"""Conversations as Python programs have them: OpenAI's messages, checked and made ready to be rendered.

HTTP checks its bodies by itself (``server/http/schema.py``); both make messages in ``make_message``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.text.messages import REASONING_FIELDS, ROLES, Message, make_message
from server.errors import InvalidRequest

_UNDERSTOOD = {"role", "content", *REASONING_FIELDS}


def read_conversation(messages: Sequence[Mapping[str, object]]) -> list[Message]:
    """``{"role": …, "content": …}`` each; the content is a text or a list of text parts.

    Raises InvalidRequest, which names the message and the field.
    """
    if not messages:
        raise InvalidRequest("The conversation is empty; it needs at least one message.", "messages")
    return [_read(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read(message: Mapping[str, object], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be a dict with 'role' and 'content'.", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise InvalidRequest(f"{where}.role must be one of {known}, not {role!r:.60}.", f"{where}.role")
    for key, value in message.items():
        if value is not None and key not in _UNDERSTOOD:
            raise InvalidRequest(f"{where}.{key:.60} is not supported; leave it out.", f"{where}.{key:.60}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key) is not None), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise InvalidRequest(f"{where}: the reasoning must be a text.", where)
    return make_message(role, _texts(content, f"{where}.content"), reasoning)


def _texts(content: object, where: str) -> list[str]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{where} must be a text or a list of text parts.", where)
    return [_text_of_part(part, f"{where}[{number}]") for number, part in enumerate(parts)]


def _text_of_part(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequest(f"{where} must be a text part: {{'type': 'text', 'text': 'Hi'}}.", where)
