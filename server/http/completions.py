"""``POST /v1/completions``: one prompt or several, as text or token ids. Logprobs have the older shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.engine.interface import TokenLogprob
from server.engine.sampling_params import SamplingParams
from server.errors import InvalidRequest
from server.http.context import Context, context_of
from server.http.generation import Completion, CompletionStream, begin, room_for_answer, submit
from server.http.limits import read_body_reserved
from server.http.record import record_of
from server.http.respond import respond
from server.http.schema import CompletionBody, Prompt, UsageInStream
from server.http.sse import Chunks

DEFAULT_MAX_TOKENS = 16


async def completions(request: Request) -> Response:
    """Continue one prompt or several, whole or streamed."""
    context, record = context_of(request), record_of(request)
    async with read_body_reserved(request, CompletionBody, context.config.max_body_bytes) as body:
        await begin(record, context, body, "cmpl")
        with context.service.holding(record.adapter) as version:
            prompts = [await _tokens(context, prompt) for prompt in body.prompt]
            pairs = [(prompt, _sampling(context, body, prompt)) for prompt in prompts]
            stream = await submit(record, context, version, pairs)
    content = partial(_content, logprobs=body.logprobs is not None)
    return await respond(request, body, stream, "text_completion", content, _chunks)


async def _tokens(context: Context, prompt: Prompt) -> tuple[int, ...]:
    tokens = tuple(await context.service.encode(prompt)) if isinstance(prompt, str) else prompt
    if not tokens:
        raise InvalidRequest("'prompt' has no tokens; give at least one.", "prompt")
    return tokens


def _sampling(context: Context, body: CompletionBody, prompt: tuple[int, ...]) -> SamplingParams:
    base = context.service.base
    limit = room_for_answer("prompt", len(prompt), body.asked_tokens, base.max_model_len, DEFAULT_MAX_TOKENS)
    return body.sampling(limit, body.logprobs, base.defaults)


def _content(completion: Completion, logprobs: bool) -> dict[str, Any]:
    return {
        "text": completion.text,
        "logprobs": _logprobs(completion.logprobs, 0) if logprobs else None,
    }


async def _chunks(stream: CompletionStream, usage: UsageInStream) -> Chunks:
    envelope = stream.envelope("text_completion")
    offsets = [0] * stream.choices
    async for delta in stream.deltas():
        if not (delta.text or delta.logprobs or delta.finish_reason):
            continue
        logprobs = None
        if delta.logprobs is not None:
            logprobs = _logprobs(delta.logprobs, offsets[delta.index])
            offsets[delta.index] += sum(len(token.token) for token in delta.logprobs)
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        yield envelope | stream.usage_so_far(usage) | {"choices": [choice]}
    if usage != "none":
        yield envelope | {"choices": [], "usage": stream.usage()}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older shape: parallel lists. ``text_offset`` counts the answer's characters, from ``offset`` on."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the sampled one. Of tokens with the same text, only the likeliest is shown."""
    best: dict[str, float] = {}
    for each in (*token.top, token):
        best[each.token] = max(best.get(each.token, each.logprob), each.logprob)
    return best
