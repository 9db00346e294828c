"""What a conversation is before it is rendered."""

from __future__ import annotations

from collections.abc import Iterable

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``), ``content``, and possibly ``reasoning_content``."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles as chat templates know them; ``developer`` is its newer word for ``system``."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which files and clients give an assistant's reasoning, the usual one first."""


def make_message(role: str, texts: Iterable[str], reasoning: str | None = None) -> Message:
    """A message as chat templates take it; only an assistant's has reasoning.

    Args:
        role: one of ``ROLES``.
        texts: its content, in parts.
    """
    message = {"role": ROLES[role], "content": join_parts(texts)}
    if role == "assistant" and reasoning is not None:
        message["reasoning_content"] = reasoning
    return message


def join_parts(texts: Iterable[str]) -> str:
    """The content of a message that came in text parts; vLLM joins them like this for templates of text."""
    return "\n".join(texts)
