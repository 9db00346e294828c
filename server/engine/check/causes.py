"""What a deviation points to, found by trying simpler steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.engine.check.sample import Request, Step, lone_chunked_steps, lone_steps

_ALONE = (
    "a whole prompt is wrong even alone, so its masks, its positions or its attention differ from what "
    "transformers' attention interface states"
)
_CHUNKED = (
    "a whole prompt alone is right, but not in chunks or in decoding, so layers keep a state besides keys "
    "and values, or something depends on the step's length"
)
_MIXED = "each request alone is right, but not beside another one, so state or masks leak between requests"
WITH_ADAPTER = "the base is right, but not with an adapter on its linears"
BESIDE_ADAPTER = "the base is right, but not beside a request with an adapter"


def cause_of(is_right: Callable[[Sequence[Step]], bool], requests: Sequence[Request], max_tokens: int) -> str:
    """Why the base's mixed steps are wrong. ``is_right`` computes steps and compares them."""
    if not is_right(lone_steps(requests, max_tokens)):
        return _ALONE
    return _MIXED if is_right(lone_chunked_steps(requests, max_tokens)) else _CHUNKED
