"""How a request samples: its parameters, their allowed ranges and their defaults. No torch, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample tokens, and when to stop. Ranges are checked where requests enter (HTTP, ``LLM``).

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: below 1e-5 means greedy.
        top_p: keep the smallest set of tokens with this probability mass; 0 = greedy.
        top_k: keep this many tokens; 0 = all.
        min_p: keep tokens with at least this share of the largest probability; 0 = all.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens.
        repetition_penalty: Hugging Face's, over prompt and generated tokens; 1 = none.
        logit_bias: values added to the logits, by token id.
        seed: samples depend on (seed, index, position) alone; None = a fresh seed.
        stop: strings that end the text. The text is cut before them.
        stop_token_ids: tokens that end the answer, as the end-of-sequence token does.
        ignore_eos: continue after the end-of-sequence token.
        min_tokens: the least number of tokens before an end-of-sequence or stop token can be sampled.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: None = none; k = log-probabilities of the sampled token and of the k most likely ones.
        n: the number of independent answers.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1


SAMPLING_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, (1 << 31) - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
"""The allowed ranges, ends included. Within them a finite logit stays finite."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Defaults for fields that a request leaves out; None = the default of ``SamplingParams``.

    Attributes:
        max_tokens: for chats; None = a chat may use the rest of the context.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, float]:
        """The defaults that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}
