"""Converts a conversation to the tokens of its prompt, and of the answer to learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.text.messages import Message
from adapters.text.special import SpecialTokens, unmarked
from adapters.text.template import ChatTemplate, TemplateRefused


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer and its prompt, in tokens.

    Attributes:
        prompt: the same tokens as in serving.
        answer: the tokens that follow the prompt, without line breaks at the end.
        ended: whether the template writes something after the answer's text.
    """

    prompt: list[int]
    answer: list[int]
    ended: bool


class ChatRenderer:
    """Renders conversations with one template. Immutable, so any thread may use it.

    Args:
        special: the tokenizer's special tokens.
        allow_special_tokens: users may write special tokens in messages.
    """

    def __init__(
        self, special: SpecialTokens, template: ChatTemplate, allow_special_tokens: bool = False
    ) -> None:
        self.special = special
        self.template = template
        self._marker = None if allow_special_tokens else special.marker(template.literals)

    def prompt(self, messages: Sequence[Message], check: Callable[[str], None] | None = None) -> list[int]:
        """Token ids of the conversation, including the generation prompt. Raises TemplateRefused.

        ``check`` gets the rendered text before it is tokenised, and may raise any error.
        """
        messages, marked = self._mark(messages)
        text = self.template.render(messages, add_generation_prompt=True)
        if check is not None:
            check(unmarked(text))
        try:
            return self.special.encode(text, marked)
        except ValueError as error:
            raise TemplateRefused(str(error)) from error

    def turn(self, messages: Sequence[Message]) -> Turn:
        """The last message, which is the assistant's, as the answer to all messages before it.

        Raises:
            TemplateRefused: the template raised, or the answer's begin cannot be found in its output.
        """
        said = messages[-1]["content"].rstrip()
        messages, marked = self._mark(messages)
        prompt = self.template.render(messages[:-1], add_generation_prompt=True)
        whole = self.template.render(messages, add_generation_prompt=False).rstrip("\n")
        if not whole.startswith(prompt):
            raise TemplateRefused("it does not render the answer directly after the prompt")
        answer = whole[len(prompt) :]
        try:
            head = self.special.encode(prompt, marked)
            tail = self.special.encode_after(prompt, head, answer, marked)
        except ValueError as error:
            raise TemplateRefused(str(error)) from error
        return Turn(head, tail, ended=not unmarked(answer).endswith(said))

    def _mark(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        return (messages, False) if self._marker is None else self._marker.mark(messages)


def base_renderer(fast: Any, allow_special_tokens: bool = False) -> ChatRenderer | None:
    """A renderer with the tokenizer's template for conversations without tools. None = it has no template."""
    if not fast.chat_template:
        return None
    template = ChatTemplate(fast.get_chat_template(), dict(fast.special_tokens_map))
    return ChatRenderer(SpecialTokens(fast), template, allow_special_tokens)
