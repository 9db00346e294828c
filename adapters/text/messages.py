"""The messages of a conversation before rendering."""

from __future__ import annotations

from collections.abc import Iterable

Message = dict[str, str]
"""``role`` (``system``, ``user`` or ``assistant``), ``content``, and possibly ``reasoning_content``."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles mapped to those of chat templates. ``developer`` is the newer name of ``system``."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Field names for an assistant's reasoning in files and requests, the usual one first."""


def make_message(role: str, texts: Iterable[str], reasoning: str | None = None) -> Message:
    """A message as chat templates take it. Only an assistant's message has reasoning.

    Args:
        role: one of ``ROLES``.
        texts: its content, in parts.
    """
    message = {"role": ROLES[role], "content": join_parts(texts)}
    if role == "assistant" and reasoning is not None:
        message["reasoning_content"] = reasoning
    return message


def join_parts(texts: Iterable[str]) -> str:
    """Joins a message's text parts into its content, as vLLM does for templates that take text."""
    return "\n".join(texts)
