"""How a request samples: its parameters, their allowed ranges and their defaults. No torch, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when to stop. Ranges are checked where requests enter (HTTP).

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: below 1e-5 means greedy.
        top_p, top_k, min_p: keep the smallest set with that mass (0 = greedy); that many (0 = all); that
            share of the largest probability (0 = all).
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens.
        repetition_penalty: Hugging Face's, over prompt and generated tokens; 1 = none.
        logit_bias: added to the logits, by token id.
        seed: draws depend on (seed, index, position) alone; None = a fresh one.
        stop: strings that end the text, which is cut before them.
        stop_token_ids: tokens that end it as the end-of-sequence token does.
        ignore_eos: go on after the end-of-sequence token.
        min_tokens: end-of-sequence and stop tokens cannot be drawn before so many tokens.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: None = none; k = the drawn token's and the k most likely ones'.
        n: how many independent answers.
    """

    max_tokens: int
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
"""What may be asked for, ends included; within it a finite logit stays finite."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What requests get that do not say it themselves; None = as ``SamplingParams`` has it.

    Attributes:
        max_tokens: of chats; without it they may take all that the context leaves.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, float]:
        """By name, those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}
