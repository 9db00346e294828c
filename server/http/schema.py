"""The request bodies of chat and completions, as strict models."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, model_validator

from server.engine.sampling_params import SAMPLING_RANGES, SamplingDefaults, SamplingParams
from server.errors import InvalidRequest
from server.http import fields
from server.http.body import MAX_VALUES, Body, Name
from server.http.messages_schema import Message, few_parts

MAX_CHOICES = 128
"""Most answers to one request; OpenAI's limit of ``n``."""
MAX_TOKEN_ID = (1 << 31) - 1
MAX_BIASES = 1024
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Prompt = str | tuple[int, ...]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_CHOICES)]
)
"""What ``_prompts`` takes."""
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
]
"""What ``_biases`` takes."""
UsageInStream = Literal["none", "at the end", "every chunk"]


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


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
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases, Biases)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        list[StopString],
        FailFast(),
        BeforeValidator(_one_as_list, StopString | list[StopString]),
        Field(max_length=16),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], FailFast(), Field(max_length=64)] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] = 0
    skip_special_tokens: bool = True
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
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


class ChatBody(Generate):
    """``POST /v1/chat/completions``."""

    rules = fields.CHAT

    messages: Annotated[list[Message], FailFast(), BeforeValidator(few_parts), Field(min_length=1)]
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

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts, Prompts)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionBody:
        if len(self.prompt) * self.n > MAX_CHOICES:
            message = f"{len(self.prompt)} prompts with n={self.n} are more than {MAX_CHOICES} answers."
            raise InvalidRequest(message, "prompt" if self.n == 1 else "n")
        return self
