"""What is wrong with a request, as far as it can be known before the engine takes it. No torch, no HTTP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from server.engine.interface import GenerationRequest
from server.engine.sampling_params import SAMPLING_RANGES, SamplingParams
from server.errors import InvalidRequest, PromptTooLong

MAX_LOGPROBS = 20
_MAX_INT = (1 << 31) - 1
_RANGES: Mapping[str, tuple[float, float]] = {
    **SAMPLING_RANGES,
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "max_tokens": (1, _MAX_INT),
    "min_tokens": (0, _MAX_INT),
    "n": (1, _MAX_INT),
    "logprobs": (0, MAX_LOGPROBS),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
"""Of fields that hold a number; one whose ends are whole numbers takes whole numbers only."""


@dataclass(frozen=True, slots=True)
class RequestChecks:
    """What a base can take.

    Attributes:
        max_model_len: tokens of prompt and answer together.
        vocab_size: of the model's logits.
    """

    max_model_len: int
    vocab_size: int

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest or PromptTooLong."""
        if not request.prompt:
            raise InvalidRequest("The prompt is empty; it needs at least one token.", param="prompt")
        if len(request.prompt) >= self.max_model_len:
            raise PromptTooLong("prompt", self.max_model_len, len(request.prompt))
        params = request.sampling
        self._check_vocabulary("prompt", request.prompt)
        self._check_vocabulary("logit_bias", params.logit_bias)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)

    def _check_vocabulary(self, field: str, tokens: Collection[int]) -> None:
        if not tokens or (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            return
        wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
        last = self.vocab_size - 1
        raise InvalidRequest(f"Token id {wrong} is outside the vocabulary (0 to {last}).", param=field)


def checked_sampling(params: SamplingParams) -> SamplingParams:
    """The same as the engine takes it, for programs that fill in ``SamplingParams`` themselves.

    Raises InvalidRequest, which names the field.
    """
    for field, (low, high) in _RANGES.items():
        value = getattr(params, field)
        if value is not None or field not in ("seed", "logprobs"):
            _check_number(field, value, low, high)
    if not isinstance(params.logit_bias, Mapping):
        raise InvalidRequest(
            f"'logit_bias' is {params.logit_bias!r:.60}; give a dict such as {{2: -5.0}}.", "logit_bias"
        )
    for token, bias in params.logit_bias.items():
        _check_number("logit_bias", token, 0, _MAX_INT)
        _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
    for field, kind, example in (("stop", str, r"('\n',)"), ("stop_token_ids", int, "(2,)")):
        values = getattr(params, field)
        if not isinstance(values, list | tuple) or not all(isinstance(v, kind) and v != "" for v in values):
            raise InvalidRequest(f"{field!r} is {values!r:.60}; give a tuple such as {example}.", field)
    if params.min_tokens > params.max_tokens:
        message = f"'min_tokens' is {params.min_tokens}, more than 'max_tokens', {params.max_tokens}."
        raise InvalidRequest(message, "min_tokens")
    return replace(
        params,
        top_k=max(params.top_k, 0),  # -1 is vLLM's word for all
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
    )


def _check_number(field: str, value: object, low: float, high: float) -> None:
    whole = isinstance(low, int)
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high:  # type: ignore[operator]
        kind = "whole number" if whole else "number"
        raise InvalidRequest(f"{field!r} is {value!r:.60}; it must be a {kind} from {low} to {high}.", field)
