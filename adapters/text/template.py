"""A chat template: Jinja as transformers runs it, in its sandbox and with its filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from adapters.text.messages import REASONING_FIELDS, Message


class TemplateRefused(Exception):
    """The template raised an error on a conversation. The message comes from the template."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the variables that it may read in addition to the messages.

    Attributes:
        source: Jinja.
        variables: the special tokens by name (``bos_token``, …).
    """

    source: str
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises TemplateRefused."""
        aliased = [_with_aliases(message) for message in messages]
        try:
            texts, _ = render_jinja_template(
                conversations=[aliased],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # templates can raise anything (jinja2's raise_exception)
            raise TemplateRefused(str(error) or type(error).__name__) from error
        text: str = texts[0]
        return text

    @cached_property
    def literals(self) -> str:
        """The literal texts in the template, joined by null characters."""
        return "\0".join(value for kind, value in self._lexed if kind in ("data", "string"))

    @cached_property
    def takes_reasoning(self) -> bool:
        """Whether the template reads an assistant's reasoning."""
        words = {value for kind, value in self._lexed if kind in ("name", "string")}
        return not words.isdisjoint(REASONING_FIELDS)

    @cached_property
    def _lexed(self) -> tuple[tuple[str, str], ...]:
        try:
            return tuple(_lex(self.source))
        except (jinja2.TemplateError, UnicodeError):  # rendering it will raise the error
            return ()


def _lex(source: str) -> Iterator[tuple[str, str]]:
    """Each token of the template as (kind, text). Strings have no quotes and escapes."""
    for _, kind, value in jinja2.Environment().lex(source):
        yield kind, _unquoted(value) if kind == "string" else value


def _unquoted(literal: str) -> str:
    """Reads a string like jinja2's lexer."""
    return literal[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")


def _with_aliases(message: Message) -> Message:
    """Copies reasoning to each field name that templates read (gpt-oss reads ``thinking``)."""
    if "reasoning_content" not in message:
        return message
    return message | {"thinking": message["reasoning_content"]}
