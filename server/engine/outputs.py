"""What ``offline.LLM`` returns: vLLM's ``RequestOutput`` and ``CompletionOutput``. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.interface import Delta, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the n answers to a prompt.

    Attributes:
        token_ids: all generated tokens, the one that ended the answer included.
        logprobs: one per token, or None if not asked for.
        stop_reason: the stop string or stop token that ended it, if one did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> CompletionOutput:
        """The whole answer of which these are all the pieces, in their order."""
        last = deltas[-1]
        assert last.finish_reason is not None, "the answer has not ended"
        wanted = last.logprobs is not None
        return cls(
            index=last.index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=tuple(one for delta in deltas for one in delta.logprobs or ()) if wanted else None,
        )


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        prompt: its text; None if it was given as token ids or as a conversation.
        outputs: the n answers, by index.
        adapter: who answered; None = the base.
        num_cached_tokens: prompt tokens that came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    adapter: str | None = None
    num_cached_tokens: int = 0
