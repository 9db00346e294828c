"""Turn a ``CompletionStream`` into the HTTP response: server-sent events, or one JSON object.

Chat and plain completions share this module. Each of them passes the shape of its choices and chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.http.context import context_of
from server.http.disconnect import until_disconnect
from server.http.generation import Completion, CompletionStream, collect
from server.http.json_response import JSONResponse
from server.http.schema import Generate, UsageInStream
from server.http.sse import Chunks, EventStream


async def respond(
    request: Request,
    body: Generate,
    stream: CompletionStream,
    kind: str,
    content: Callable[[Completion], dict[str, Any]],
    chunks: Callable[[CompletionStream, UsageInStream], Chunks],
) -> Response:
    """The response that ``body`` asks for. A client that disconnects cancels its generations.

    Args:
        kind: the value of ``object`` in a whole response.
        content: makes the fields of a choice between ``index`` and ``finish_reason``.
        chunks: makes the events of a streamed response.
    """
    closing = context_of(request).closing
    if body.stream:
        return EventStream(chunks(stream, body.usage_in_stream), stream, closing)
    try:
        completions = await until_disconnect(request.receive, closing, collect(stream))
    finally:
        stream.cancel()
    choices = [
        {"index": index}
        | content(completion)
        | {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        for index, completion in enumerate(completions)
    ]
    return JSONResponse(stream.envelope(kind) | {"choices": choices, "usage": stream.usage()})
