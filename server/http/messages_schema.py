"""The messages of a chat, as strict models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from adapters.text.messages import Message as Conversed
from adapters.text.messages import make_message
from server.http import fields
from server.http.body import Body, unsupported

MAX_PARTS = 8192
"""Most parts in all messages together."""


def _text_as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a list of parts such as {'type': 'text', 'text': 'Hi'}")
    return value


def _no_tool(value: object) -> object:
    if value in ("tool", "function"):
        raise ValueError(
            f"{value!r} is not available, because this server does not call tools; send the result of a tool "
            "in a message of the role 'user'"
        )
    return value


class Part(Body):
    """A text part of a message, or a refusal part of an assistant's message."""

    rules = fields.PART
    drops_empty = True

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _only_its_type(self) -> Part:
        other = "text" if self.type == "refusal" else "refusal"
        if getattr(self, self.type) is None:
            raise PydanticCustomError("missing", "is required", {"field": self.type})
        if getattr(self, other):
            raise unsupported(other, f"a part of the type {self.type!r} has only {self.type!r}")
        return self

    @property
    def content(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


Parts = Annotated[list[Part], Field(min_length=1)]


class Message(Body):
    """One message of a conversation. ``content`` is always a list of parts here.

    Servers return an assistant's reasoning under one of two names. Templates that use it get it from either.
    """

    rules = fields.MESSAGE
    drops_empty = True

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_no_tool)]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_text_as_parts, str | Parts)]
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        resolved = handler.resolve_ref_schema(schema)
        content = resolved["properties"]["content"]
        resolved["properties"]["content"] = {"anyOf": [content, {"type": "null"}]}  # an assistant's
        resolved["required"].remove("content")
        return schema

    @classmethod
    def _prepare(cls, data: dict[str, Any]) -> None:
        """An assistant's message may have a refusal instead of content, or neither."""
        if data.get("role") == "assistant" and data.get("content") is None:
            refusal = data.pop("refusal", None)
            data["content"] = "" if refusal is None else refusal

    @model_validator(mode="after")
    def _one_text(self) -> Message:
        if self.refusal:
            raise unsupported("refusal", "send it in 'content'")
        return self

    def rendered(self) -> Conversed:
        """The message as chat templates take it."""
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        return make_message(self.role, (part.content for part in self.content), reasoning)


def few_parts(messages: object) -> object:
    """Check the number of parts and the type of each message, before any message is checked in full."""
    if not isinstance(messages, list):
        return messages
    parts = 0
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"item {number} is not an object with 'role' and 'content'")
        content = message.get("content")
        parts += len(content) if isinstance(content, list) else 1
    if parts > MAX_PARTS:
        raise ValueError(f"the messages have {parts} parts together; at most {MAX_PARTS} are allowed")
    return messages
