"""The request bodies of chat and completions as strict models. An undeclared field is refused by name.

``fields.py`` has the fields that are accepted although they are not declared here. Sizes are checked before
contents. Checking stops at the first error, so a million wrong items cost no more than one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters.text.messages import Message as Conversed
from adapters.text.messages import make_message
from server.engine.sampling_params import SAMPLING_RANGES, SamplingDefaults, SamplingParams
from server.errors import InvalidRequest
from server.http import fields
from server.http.fields import Rules

MAX_CHOICES = 64
MAX_TOKEN_ID = (1 << 31) - 1
MAX_ITEMS = 2048
"""Most items of a list or an object, unless a field declares another limit. It is OpenAI's for messages."""
MAX_PARTS = 8192
"""Most parts in all messages together."""
MAX_BIASES = 1024
MAX_VALUES = 1 << 19
"""Most values (numbers, strings, lists, …) in a whole body. Only token ids can be that many."""
MAX_NAMES = 1 << 16
"""Most names of fields in a whole body, at all levels together. Parts and tools need far fewer."""

Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Prompt = str | tuple[int, ...]
UsageInStream = Literal["none", "at the end", "every chunk"]


class Body(BaseModel):
    """A JSON object. It may have the declared fields, and those that its ``rules`` accept.

    Attributes:
        rules: the rule of each field. A field that is neither here nor declared is refused.
        longest: the most items of a field, if it is not ``MAX_ITEMS``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
    rules: ClassVar[Rules] = {}
    longest: ClassVar[dict[str, int]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_declared(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_ITEMS:
            raise PydanticCustomError("too_many", f"has {len(data)} fields; at most {MAX_ITEMS} are allowed")
        cls._prepare(data)
        declared, kept = cls.model_fields, {}
        for key, value in data.items():
            if value is None:
                continue
            if key not in declared:
                cls._refuse_unless_harmless(key, value)
                continue
            if isinstance(value, (list, dict)) and len(value) > (most := cls.longest.get(key, MAX_ITEMS)):
                raise _too_long(key, value, most)
            kept[key] = value
        return kept

    @classmethod
    def _prepare(cls, data: dict[str, Any]) -> None:
        """Change ``data`` in place before it is checked."""

    @classmethod
    def _refuse_unless_harmless(cls, key: str, value: object) -> None:
        rule = cls.rules.get(key)
        if rule is None or not rule.accepts(value):
            remedy = "leave it out" if rule is None else rule.remedy
            raise PydanticCustomError("unsupported", "{remedy}", {"field": key, "remedy": remedy})


def _too_long(field: str, value: list[Any] | dict[str, Any], most: int) -> PydanticCustomError:
    kind = "array" if isinstance(value, list) else "object"
    message = (  # OpenAI's words
        f"{kind} too long. Expected an {kind} with maximum length {most}, "
        f"but got an {kind} with length {len(value)} instead"
    )
    context = {"field": field, "message": message}
    return PydanticCustomError(f"{kind}_above_max_length", "{message}", context)


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text_as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, or a list of parts such as {'type': 'text', 'text': 'Hi'}")
    return value


def _biases(value: object) -> dict[int, float]:
    """``{"token id": bias}`` with the ids as integers."""
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to biases")
    biases = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 11):
            raise ValueError(f"{str(token)[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {token} must be a number from -100 to 100")
        biases[int(token)] = float(bias)
    return biases


def _is_ids(value: object) -> bool:
    """Whether ``value`` is a list of token ids. There may be a million, so it has no Python loop."""
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_TOKEN_ID)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """A tuple of prompts, from one prompt or several, as strings or token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if isinstance(value[0], int):
        value = [value]
    if len(value) > MAX_CHOICES:
        raise ValueError(f"has {len(value)} prompts; at most {MAX_CHOICES} are allowed")
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(_is_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise ValueError("must have only strings, or only token ids (whole numbers from 0)")


def _within(field: str) -> Any:
    low, high = SAMPLING_RANGES[field]
    return Field(ge=low, le=high)


class StreamOptions(Body):
    """OpenAI's ``stream_options``. vLLM's ``continuous_usage_stats`` adds the usage so far to every chunk."""

    rules = fields.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Generate(Body):
    """The fields that chat and plain completions share."""

    longest: ClassVar = {"logit_bias": MAX_BIASES, "metadata": 16}

    model: Name
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, _within("temperature")] = 1.0
    top_p: Annotated[float, _within("top_p")] = 1.0
    top_k: Annotated[int, _within("top_k")] = 0
    min_p: Annotated[float, _within("min_p")] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, _within("repetition_penalty")] = 1.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[list[StopString], FailFast(), BeforeValidator(_one_as_list), Field(max_length=16)] = (
        Field(default_factory=list)
    )
    stop_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] = 0
    skip_special_tokens: bool = True
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # Tags of stored completions. Nothing is stored here, so they have no effect.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true.", "stream_options")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidRequest(
                f"'max_tokens' is {self.max_tokens}, but 'max_completion_tokens' is "
                f"{self.max_completion_tokens}. They mean the same; send one of them.",
                "max_tokens",
            )
        return self

    @property
    def asked_tokens(self) -> int | None:
        """The client's own limit of the answer in tokens; None if it sent none."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def usage_in_stream(self) -> UsageInStream:
        options = self.stream_options
        if (
            options is None or not options.include_usage
        ):  # as in vLLM, the usage in every chunk needs include_usage
            return "none"
        return "every chunk" if options.continuous_usage_stats else "at the end"

    def sampling(self, max_tokens: int, logprobs: int | None, defaults: SamplingDefaults) -> SamplingParams:
        """The engine's parameters for an answer of at most ``max_tokens``.

        ``defaults`` replace the fields that the client did not send.
        """
        if self.min_tokens > max_tokens:
            message = f"'min_tokens' is {self.min_tokens}, but the answer has at most {max_tokens} tokens."
            raise InvalidRequest(message, "min_tokens")
        said = {name: getattr(self, name) for name in SAMPLING_RANGES}
        silent = SAMPLING_RANGES.keys() - self.model_fields_set
        either = said | {name: value for name, value in defaults.given().items() if name in silent}
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=either["temperature"],
            top_p=either["top_p"],
            top_k=max(int(either["top_k"]), 0),
            min_p=either["min_p"],
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=either["repetition_penalty"],
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            n=self.n,
        )


class TextPart(Body):
    """A text part of a message."""

    rules = fields.PART

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation. ``content`` is always a list of parts here.

    Servers return an assistant's reasoning under one of two names. Templates that use it get it from either.
    """

    rules = fields.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_text_as_parts)]
    reasoning_content: str | None = None
    reasoning: str | None = None

    @classmethod
    def _prepare(cls, data: dict[str, Any]) -> None:
        """Clients send an assistant's message without text as ``"content": null``."""
        if data.get("role") == "assistant" and data.get("content", "") is None:
            data["content"] = ""

    def rendered(self) -> Conversed:
        """The message as chat templates take it."""
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        return make_message(self.role, (part.text for part in self.content), reasoning)


def _few_parts(messages: object) -> object:
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


class ChatBody(Generate):
    """``POST /v1/chat/completions``."""

    rules = fields.CHAT

    messages: Annotated[list[Message], FailFast(), BeforeValidator(_few_parts), Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        return self


class CompletionBody(Generate):
    """``POST /v1/completions``."""

    rules = fields.COMPLETION
    longest: ClassVar = Generate.longest | {
        "prompt": MAX_VALUES
    }  # token ids; ``_prompts`` limits the number of strings

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionBody:
        if len(self.prompt) * self.n > MAX_CHOICES:
            message = f"{len(self.prompt)} prompts with n={self.n} are more than {MAX_CHOICES} answers."
            raise InvalidRequest(message, "prompt" if self.n == 1 else "n")
        return self
