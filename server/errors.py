"""The tree of all errors of requests. ``server/http/errors.py`` maps them to HTTP.

::

    ManyloraError (adapters/errors.py)
    └── RequestError
        ├── InvalidRequest          a field is wrong; ``param`` names it
        ├── PromptTooLong           the prompt and the requested answer exceed the context
        ├── QueueFull               the queue is full; ``retry_after`` has seconds
        ├── ShuttingDown            the server drains and takes no new requests
        ├── RequestFailed           processing of this request failed; others continue
        ├── AnswerNotRead           the client has left too much of the answer unread
        ├── OutOfMemory             the device has too little free memory for this request
        └── EngineDead              the engine's loop has ended; ``/health`` reports it
"""

from __future__ import annotations

from adapters.errors import ManyloraError


class RequestError(ManyloraError):
    """A request that ended before all its tokens were generated."""


class InvalidRequest(RequestError):
    """A field is wrong.

    Attributes:
        param: the field's name as the client wrote it; None: the whole body.
        code: OpenAI's machine-readable code, if there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and the requested answer, do not fit into the context.

    The message has OpenAI's words. Gateways and agents search for them, and then shorten the conversation.

    Args:
        field: ``messages`` or ``prompt``.
        context: the most tokens of prompt and answer together.
        prompt: tokens of the prompt.
        answer: the requested tokens of the answer; None: as many as fit, at least one.
        at_least: the prompt was not counted to its end, so it has at least ``prompt`` tokens.
    """

    def __init__(
        self, field: str, context: int, prompt: int, answer: int | None = None, at_least: bool = False
    ) -> None:
        if answer is None:
            needs = f"your {field} resulted in {'at least ' * at_least}{prompt} tokens"
            remedy = f"Please reduce the length of the {field}."
        else:
            parts = f"{prompt} in the {field}, {answer} in the completion"
            needs = f"you requested {prompt + answer} tokens ({parts})"
            remedy = f"Please reduce the length of the {field} or completion."
        message = f"This model's maximum context length is {context} tokens. However, {needs}. {remedy}"
        super().__init__(message, field, "context_length_exceeded")


class QueueFull(RequestError):
    """Too many requests are waiting.

    Attributes:
        retry_after: seconds after which the client should try again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(RequestError):
    """The server is draining and takes no new requests."""


class RequestFailed(RequestError):
    """Processing of this request failed. Other requests are not affected."""


class AnswerNotRead(RequestError):
    """The client has left too much of the answer unread, so the answer was dropped."""


class OutOfMemory(RequestError):
    """The device has too little memory for this request, even alone. A later try may succeed."""


class EngineDead(RequestError):
    """The engine's loop has ended. Restart the server."""
