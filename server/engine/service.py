"""Implements ``server.engine.interface.Service``: carries requests to the engine's thread and outputs back.

Commands go to the thread through a deque. Outputs come back to the event loop once a step. Only the thread
touches the engine; everything else here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from adapters.errors import AdapterNotFound
from adapters.registry import Registry, Version
from adapters.text.chat_format import ChatFormat
from adapters.watcher import Watcher
from server.engine import threads
from server.engine.answer import RunningGeneration
from server.engine.engine import Engine, Output
from server.engine.interface import AdapterStatus, EngineStats, Generation, GenerationRequest, ModelInfo
from server.engine.listing import AdapterListing
from server.engine.lookup import AdapterLookup
from server.engine.request_checks import RequestChecks
from server.engine.text_bounds import LONG_TEXT
from server.engine.tokenizer import Tokenizer
from server.errors import EngineDead, QueueFull, ShuttingDown
from server.pools import Pool

log = logging.getLogger("manylora.engine")

Command = Callable[[], None]
_RETRY_WAITING = 0.05
"""Seconds between checks of the waiting requests when nothing runs; an adapter may have been loaded."""


class EngineService:
    """Runs the engine on its own thread and carries requests to it.

    Args:
        engine, registry, watcher, tokenizer, listing: the parts, already built.
        stats: returns a snapshot of the parts' counters; cheap, and safe from any thread.
        max_queued: most requests that may wait to start.
        num_threads: the number of threads that the engine computes with.
        on_close: frees what the parts hold, after the thread has ended.
    """

    def __init__(
        self,
        base: ModelInfo,
        engine: Engine,
        registry: Registry,
        watcher: Watcher,
        tokenizer: Tokenizer,
        listing: AdapterListing,
        stats: Callable[[], EngineStats],
        max_queued: int,
        num_threads: int,
        on_close: Callable[[], None],
    ) -> None:
        self._base = base
        self._engine = engine
        self._registry = registry
        self._watcher = watcher
        self._lookup = AdapterLookup(watcher.scan_folder)
        self._tokenizer = tokenizer
        self._checks = RequestChecks(base.max_model_len, tokenizer.vocab_size)
        self._listing = listing
        self._stats = stats
        self._max_queued = max_queued
        self._num_threads = num_threads
        self._on_close = on_close
        self._base_tag = f"{base.quantization}-{base.digest[:12]}"
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._claimed = threading.Event()
        self._stopping = False
        self._draining = False
        self._failure: str | None = None
        self._running: dict[str, RunningGeneration] = {}
        self._ends: deque[float] = deque(maxlen=32)
        self._texts, self._long_texts, self._templates, self._loading = (
            Pool("tokenizing"),
            Pool("long-texts"),
            Pool("templates"),
            Pool("adapters"),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- lifecycle --------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._claimed.wait()
        threads.step_aside()
        self._watcher.start()

    def begin_drain(self) -> None:
        """Take no new requests; those already here continue."""
        self._draining = True

    async def drain(self, timeout: float) -> bool:
        """Wait until every request has ended; False if some have not after ``timeout`` seconds."""
        self.begin_drain()
        deadline = time.monotonic() + timeout
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._running

    def stop(self) -> None:
        """End the thread after the current step, and free everything."""
        self._stopping = True
        self._wake.set()
        self._watcher.stop()
        self._lookup.close()
        if self._thread.ident is not None:
            self._thread.join()
        for pool in (self._texts, self._long_texts, self._templates, self._loading):
            pool.close()
        self._on_close()

    def wake(self) -> None:
        """Check the waiting requests again, because an adapter's state has changed; from any thread."""
        self._wake.set()

    # -- interface for HTTP -----------------------------------------------------------------------

    @property
    def base(self) -> ModelInfo:
        return self._base

    def stats(self) -> EngineStats:
        return self._stats()

    def failure(self) -> str | None:
        return self._failure

    def draining(self) -> bool:
        return self._draining

    async def encode(self, text: str) -> list[int]:
        return await self._pool_for(len(text)).run(self._tokenizer.encode, text)

    @contextmanager
    def holding(self, adapter: str | None) -> Iterator[Version | None]:
        version = None if adapter is None else self._registry.checkout(adapter)
        try:
            yield version
        finally:
            if version is not None:
                self._registry.release(version)

    async def render_chat(self, messages: list[dict[str, str]], version: Version | None = None) -> list[int]:
        size = sum(len(message["content"]) for message in messages)
        chat_format = self._chat_format(version)
        pool = self._templates if chat_format.from_adapter else self._pool_for(size)
        return await pool.run(self._tokenizer.render_chat, messages, chat_format)

    async def submit(self, request: GenerationRequest) -> Generation:
        """See ``Service.submit``.

        Raises:
            EngineDead, ShuttingDown, QueueFull, PromptTooLong, InvalidRequest, AdapterError: at once.
        """
        self._check_open()
        self._checks.check(request)
        version = self._checkout(request)
        generation = RunningGeneration(
            request, self._tokenizer, self._base_tag, version.digest if version else None,
            cancel=partial(self._cancel, request.request_id),
            stop_answer=partial(self._stop_answer, request.request_id),
        )  # fmt: skip
        self._running[request.request_id] = generation
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
        self._send(partial(self._engine.add, request, version, seed, self._chat_format(version).eos))
        return generation

    def adapters(self) -> list[AdapterStatus]:
        return self._listing.all()

    def adapter(self, name: str) -> AdapterStatus | None:
        return self._listing.one(name)

    def adapter_names(self) -> list[str]:
        return self._listing.names()

    def has_adapter(self, name: str) -> bool:
        return self._listing.has(name)

    async def find_adapter(self, name: str) -> bool:
        if not self._listing.has(name):
            await self._lookup.look_for(name)
        return self._listing.has(name)

    async def load_adapter(self, name: str, path: str, replace: bool) -> AdapterStatus:
        await self._loading.run(self._register, name, path, replace)
        status = self._listing.one(name)
        if status is None:
            raise AdapterNotFound(f"Adapter {name!r} was unloaded while it was loaded.")
        return status

    async def unload_adapter(self, name: str) -> None:
        self._watcher.suppress(name)  # its folder is still there: do not load it again
        self._registry.unregister(name)

    def _register(self, name: str, path: str, replace: bool) -> None:
        if not os.path.lexists(self._registry.check(name, path)):
            raise AdapterNotFound(f"There is no {path!r:.300} in the adapter folder.")
        self._registry.register(name, path, replace)

    def _checkout(self, request: GenerationRequest) -> Version | None:
        """The version that serves the request, acquired until the engine releases it."""
        if request.version is not None:
            self._registry.acquire(request.version)
            return request.version
        return self._registry.checkout(request.adapter) if request.adapter is not None else None

    def _chat_format(self, version: Version | None) -> ChatFormat:
        return self._tokenizer.chat_formats.of(version.info.chat_config if version else None)

    def _pool_for(self, characters: int) -> Pool:
        return self._texts if characters < LONG_TEXT else self._long_texts

    # -- event loop -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineDead(f"The engine has ended ({self._failure}); the server must be restarted.")
        if self._draining:
            raise ShuttingDown("The server is shutting down; send the request elsewhere.")
        waiting = self._engine.num_waiting + len(self._commands)
        if waiting >= self._max_queued:
            raise QueueFull(
                f"{waiting} requests are waiting already, the most that --max-queued-requests allows.",
                retry_after=self._seconds_for(waiting),
            )

    def _seconds_for(self, waiting: int) -> int:
        """How long the queue takes at the rate of the latest requests, between 1 and 60 s."""
        if len(self._ends) < 2:
            return 1
        pace = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(60, max(1, math.ceil(waiting * pace)))

    def _cancel(self, request_id: str) -> None:
        if self._running.pop(request_id, None) is not None:
            self._send(partial(self._engine.abort, request_id))

    def _stop_answer(self, request_id: str, index: int) -> None:
        self._send(partial(self._engine.abort_answer, request_id, index))

    def _send(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    def _deliver(self, outputs: list[Output], ended: list[str]) -> None:
        for output in outputs:
            generation = self._running.get(output.request_id)
            if generation is not None:
                generation.deliver(output)
        for request_id in ended:
            self._running.pop(request_id, None)
            self._ends.append(time.monotonic())

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            threads.claim(self._num_threads)
            self._claimed.set()
            while not self._stopping:
                self._turn()
        except Exception as error:
            log.critical("the engine's loop ended", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")

    def _turn(self) -> None:
        """Run the commands, make one step, deliver its outputs; sleep while there is nothing to do."""
        self._wake.clear()
        while self._commands:
            self._commands.popleft()()
        outputs = self._engine.step() if self._engine.busy else []
        ended = self._engine.take_ended()
        if outputs or ended:
            self._post(self._deliver, outputs, ended)
        if not self._engine.busy:
            self._wake.wait()
        elif not self._engine.running:
            self._wake.wait(_RETRY_WAITING)

    def _die(self, why: str) -> None:
        self._failure = why
        error = EngineDead(f"The engine has ended ({why}); the server must be restarted.")
        self._post(self._fail_all, error)

    def _fail_all(self, error: EngineDead) -> None:
        for request_id, generation in self._running.items():
            generation.deliver(Output(request_id, 0, token=-1, error=error))
        self._running.clear()

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed: there are no clients any more
            self._stopping = True
