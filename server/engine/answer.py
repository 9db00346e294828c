"""Turns the engine's outputs into deltas: text, stop strings, log-probabilities.

Runs on the event loop, not on the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from server.engine.engine import Output
from server.engine.interface import Delta, GenerationRequest, TokenLogprob
from server.engine.sampling.sampler import RankedLogprobs
from server.engine.sampling_params import SamplingParams
from server.engine.stop_strings import Scan, StopScanner
from server.engine.tokenizer import Tokenizer
from server.errors import AnswerNotRead

MAX_UNREAD = 1 << 18
"""Most tokens and log-probabilities, of about 100 bytes each, that may wait for the client to read them."""


class StreamedAnswer:
    """One of a request's n answers, streamed: turns each of its outputs into a delta."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self._params = params
        self._tokenizer = tokenizer
        self._text = tokenizer.stream(params.skip_special_tokens)
        self._scanner = StopScanner(params.stop)
        self._count = 0

    def push(self, output: Output) -> Delta:
        """The delta for one more token. A stop string may end the answer before the engine knows."""
        self._count += 1
        token = output.token
        ends = output.reason == "stop"  # an end-of-sequence or stop token is not part of the text
        scan = self._scan("" if ends else self._text.push(token))
        text, reason = scan.text, output.reason
        if scan.stop is not None:
            reason = "stop"
        elif reason is not None:
            text += self._rest()
        stop_token = token if ends and token in self._params.stop_token_ids else None
        return Delta(self.index, text, (token,), self._logprobs(output), reason, scan.stop or stop_token)

    def _scan(self, text: str) -> Scan:
        return self._scanner.push(text) if self._count >= self._params.min_tokens else Scan(text)

    def _rest(self) -> str:
        scan = self._scanner.push(self._text.finish())
        return scan.text + self._scanner.finish()

    def _logprobs(self, output: Output) -> tuple[TokenLogprob, ...] | None:
        if output.logprobs is None:
            return None
        ranked: RankedLogprobs = output.logprobs
        top = tuple(self._logprob(i, value) for i, value in zip(ranked.top_ids, ranked.top, strict=True))
        return (self._logprob(output.token, ranked.sampled, top),)

    def _logprob(self, token: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text, raw = self._tokenizer.piece(token)
        return TokenLogprob(token, text, raw, value, top)


class RunningGeneration:
    """Implements ``server.engine.interface.Generation``: all n answers of one request, as they are generated.

    Args:
        base_tag: identifies the base in the fingerprint.
        cancel: ends the request in the engine.
        stop_answer: ends one answer in the engine, because its stop string was found.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        base_tag: str,
        digest: str | None,
        cancel: Callable[[], None],
        stop_answer: Callable[[int], None],
    ) -> None:
        self._request_id = request.request_id
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._unread = 0
        self._answers = {i: StreamedAnswer(i, request.sampling, tokenizer) for i in range(request.sampling.n)}
        self._base_tag = base_tag
        self._digest = digest
        self._cancel = cancel
        self._stop_answer = stop_answer
        self._cached = 0
        self._submitted = time.monotonic()
        self._queue_seconds: float | None = None

    @property
    def fingerprint(self) -> str:
        return self._base_tag if self._digest is None else f"{self._base_tag}-lora-{self._digest[:12]}"

    @property
    def cached_tokens(self) -> int:
        return self._cached

    @property
    def queue_seconds(self) -> float | None:
        return self._queue_seconds

    def deliver(self, output: Output) -> None:
        """Take one more output of this request. A client that reads too slowly loses its answer."""
        self._unread += _size(output)
        if self._unread > MAX_UNREAD:
            self._cancel()
            self._outputs = asyncio.Queue()  # no task waits on the old queue: it is full
            why = "The answer was read so slowly that it was ended; read it as it comes."
            output = Output(self._request_id, 0, token=-1, error=AnswerNotRead(why))
        self._outputs.put_nowait(output)

    def cancel(self) -> None:
        if self._answers:
            self._answers.clear()
            self._cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._answers:
            output = await self._outputs.get()
            self._unread -= _size(output)
            if output.error is not None:
                self._answers.clear()
                raise output.error
            answer = self._answers.get(output.index)
            if answer is None:  # its stop string was found; the engine did not know yet
                continue
            if output.index == 0:
                self._cached = output.cached
                self._queue_seconds = output.started - self._submitted
            self._digest = output.digest
            delta = answer.push(output)
            if delta.finish_reason is not None:
                del self._answers[output.index]
                if output.reason is None:
                    self._stop_answer(output.index)
            yield delta


def _size(output: Output) -> int:
    return 1 + (len(output.logprobs.top) if output.logprobs is not None else 0)
