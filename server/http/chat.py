"""``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.engine.interface import Delta, TokenLogprob
from server.engine.sampling_params import SamplingParams
from server.http.context import Context, context_of
from server.http.generation import Completion, CompletionStream, begin, room_for_answer, submit
from server.http.limits import read_body_reserved
from server.http.record import record_of
from server.http.respond import respond
from server.http.schema import ChatBody, UsageInStream
from server.http.sse import Chunks


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or streamed."""
    context, record = context_of(request), record_of(request)
    async with read_body_reserved(request, ChatBody, context.config.max_body_bytes) as body:
        await begin(record, context, body, "chatcmpl")
        with context.service.holding(record.adapter) as version:
            messages = [message.rendered() for message in body.messages]
            prompt = tuple(await context.service.render_chat(messages, version))
            sampling = _sampling(context, body, prompt)
            stream = await submit(record, context, version, [(prompt, sampling)])
    content = partial(_content, logprobs=body.logprobs)
    return await respond(request, body, stream, "chat.completion", content, _chunks)


def _sampling(context: Context, body: ChatBody, prompt: tuple[int, ...]) -> SamplingParams:
    base = context.service.base
    limit = room_for_answer(
        "messages", len(prompt), body.asked_tokens, base.max_model_len, base.defaults.max_tokens
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return body.sampling(limit, logprobs, base.defaults)


def _content(completion: Completion, logprobs: bool) -> dict[str, Any]:
    return {
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": _logprobs(completion.logprobs) if logprobs else None,
    }


async def _chunks(stream: CompletionStream, usage: UsageInStream) -> Chunks:
    envelope, started = stream.envelope("chat.completion.chunk"), False
    async for delta in stream.deltas():
        chunk = envelope | stream.usage_so_far(usage)
        if not started:
            started = True
            for index in range(stream.choices):
                yield chunk | {"choices": [_choice(index, {"role": "assistant", "content": ""})]}
        if delta.text or delta.logprobs or delta.finish_reason:
            yield chunk | {"choices": [_delta_choice(delta)]}
    if usage != "none":
        yield envelope | {"choices": [], "usage": stream.usage()}


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta_choice(delta: Delta) -> dict[str, Any]:
    choice = _choice(delta.index, {"content": delta.text} if delta.text else {})
    if delta.logprobs is not None:
        choice["logprobs"] = _logprobs(delta.logprobs)
    if delta.finish_reason is not None:
        choice |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
    return choice


def _logprobs(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
    content = [_token(token) | {"top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token_bytes)}
