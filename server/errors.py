"""Every way a request can fail, as one tree; ``server/http/errors.py`` maps it to HTTP in one place.

::

    ManyloraError (adapters/errors.py)
    └── RequestError
        ├── InvalidRequest          a field is wrong; ``param`` names it
        ├── PromptTooLong           the prompt (and what is asked for) exceeds the context
        ├── QueueFull               the waiting queue is at its bound; ``retry_after`` seconds
        ├── ShuttingDown            the server drains; send the request elsewhere
        ├── RequestFailed           processing this one request raised; the others went on
        ├── AnswerNotRead           too much of the answer waits to be read
        ├── OutOfMemory             the device has too little memory left for this one request now
        └── EngineDead              the engine's loop ended; ``/health`` says so
"""

from __future__ import annotations

from adapters.errors import ManyloraError


class RequestError(ManyloraError):
    """A request that ends without (all of) its tokens."""


class InvalidRequest(RequestError):
    """A field is wrong.

    Attributes:
        param: the field's name as the client wrote it, or None for the body as a whole.
        code: OpenAI's machine-readable code, where there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(InvalidRequest):
    """The prompt, or with it the answer that is asked for, does not fit into the context.

    The words are OpenAI's: gateways and agents look for them, to shorten the conversation by themselves.

    Args:
        field: ``messages`` or ``prompt``.
        context: tokens of prompt and answer together, at most.
        prompt: tokens of the prompt.
        answer: tokens that were asked for; None = as many as fit, at least one.
        at_least: the prompt was not counted to its end.
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
    """Too many requests wait already.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(RequestError):
    """The server is draining and takes no new requests."""


class RequestFailed(RequestError):
    """Processing this request raised; nobody else's was touched."""


class AnswerNotRead(RequestError):
    """So much of the answer is unread that it is kept no longer."""


class OutOfMemory(RequestError):
    """The device ran out of memory over this request, even alone; later it may not."""


class EngineDead(RequestError):
    """The engine's loop has ended; nothing can be served until a restart."""
