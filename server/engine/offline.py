"""The engine as a library: many prompts in, all answers out, in the calling thread. No HTTP, no event loop.

The class is vLLM's ``LLM``, with an adapter for each prompt::

    from server.engine.offline import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=16)
    with LLM("smollm2-135m", adapters={"pirate": "adapters/pirate"}) as llm:
        prompts = ["The sea is", "My ship is"]
        for output in llm.generate(prompts, params, adapter=["pirate", None]):
            print(output.adapter or "base", output.outputs[0].text)

        conversation = [{"role": "user", "content": "Who are you?"}]
        (answer,) = llm.chat(conversation, params, adapter="pirate")
        print(answer.outputs[0].text, answer.outputs[0].finish_reason)

All prompts of a call are queued at once; the scheduler mixes their adapters in its batches as for a server.
"""

from __future__ import annotations

import itertools
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, TracebackType
from typing import Self

from adapters.errors import AdapterNotFound
from adapters.registry import Version
from adapters.text.chat_format import ChatFormat
from server.config import ConfigError, ServerConfig, from_options
from server.config.options import OPTIONS
from server.engine.answer import StreamedAnswer
from server.engine.arguments import Conversation, Prompt, list_of_conversations, list_of_prompts, one_each
from server.engine.build import Parts, build_parts
from server.engine.conversation import read_conversation
from server.engine.engine import Output
from server.engine.interface import Delta, GenerationRequest
from server.engine.outputs import CompletionOutput, RequestOutput
from server.engine.request_checks import RequestChecks, checked_sampling
from server.engine.sampling_params import SamplingParams
from server.engine.sync_engine import SyncEngine
from server.engine.tokenizer import Tokenizer
from server.errors import EngineDead

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

Adapters = str | Path | Mapping[str, str | Path]

_OTHER_GROUPS = frozenset({"http", "connections", "training", "log"})
_OTHER_OPTIONS = frozenset({"base", "adapter_dir", "served_model_name", "max_queued_requests"})


class LLM:
    """A base and its adapters, loaded in this process. Threads may share it; their calls take turns.

    Args:
        base: as ``--base`` of ``manylora serve``.
        adapters: a folder with one sub-folder per adapter, or the adapters' folders by name; None = no
            adapters. The folder is read here, and again when a name is asked for that it did not have yet.
        options: of ``manylora serve`` for its base, adapters and engine, by their flags' names:
            ``max_num_seqs=8``, ``kv_cache_memory="2GiB"``, ``device="cpu"``. Variables such as
            ``MANYLORA_HOME`` hold where an option is not given.

    Raises:
        ConfigError: an unknown option, or a value that fits neither the model nor the memory.
        BaseModelError: the base cannot be loaded or served.
        AdapterError: one of the adapters that were given by name cannot be served.
    """

    def __init__(self, base: str | Path, adapters: Adapters | None = None, **options: object) -> None:
        by_name = adapters if isinstance(adapters, Mapping) else {}
        folder = None if adapters is None or isinstance(adapters, Mapping) else Path(adapters)
        if folder is not None and not folder.is_dir():
            raise AdapterNotFound(f"There is no folder {str(folder)!r} with adapters.")
        self._parts: Parts | None = _build(base, folder, options)
        self._watches = folder is not None
        self._engine = SyncEngine(self._parts)
        self._ids = itertools.count()
        self._turn = threading.Lock()
        try:
            for name, path in by_name.items():
                self._parts.registry.register_outside(name, Path(path), replace=False)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt. Nothing is generated unless every prompt can be.

        Args:
            prompts: one or several, each a text or token ids.
            sampling_params: for all prompts or one for each; None = the base's own defaults.
            adapter: the name for all prompts or one for each; None = the base.

        Returns:
            What came of each prompt, in their order.

        Raises:
            InvalidRequest, PromptTooLong: a prompt or its sampling; ``param`` names the field.
            AdapterError: an adapter is unknown or cannot be loaded.
            RequestFailed, OutOfMemory: an answer could not be finished; the others of the call are ended too.
            EngineDead: the LLM is closed.
        """
        listed = list_of_prompts(prompts)
        tokenizer = self._open.tokenizer
        asked = [
            _Asked(partial(_encode, tokenizer, one), one if isinstance(one, str) else None) for one in listed
        ]
        return self._answer(asked, sampling_params, adapter)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer each conversation, rendered as the server renders it: by the adapter's own template, if any.

        Args:
            conversations: one or several, each a list of OpenAI's messages (texts or text parts).
            sampling_params, adapter: as for ``generate``.

        Returns, Raises: as ``generate``.
        """
        listed = list_of_conversations(conversations)
        render = self._open.tokenizer.render_chat
        asked = [_Asked(partial(render, read_conversation(messages))) for messages in listed]
        return self._answer(asked, sampling_params, adapter)

    def close(self) -> None:
        """Free everything; harmless when closed already."""
        with self._turn:
            parts, self._parts = self._parts, None
            if parts is not None:
                del self._engine
                parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> Parts:
        if self._parts is None:
            raise EngineDead("This LLM is closed; make a new one.")
        return self._parts

    def _answer(
        self,
        asked: Sequence[_Asked],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
    ) -> list[RequestOutput]:
        with self._turn, ExitStack() as held:
            params = self._sampling(len(asked), sampling_params)
            names: list[str | None] = one_each("adapter", len(asked), adapter, str, NoneType)
            versions = {name: self._hold(name, held) for name in dict.fromkeys(names)}
            checks = RequestChecks(self._open.info.max_model_len, self._open.tokenizer.vocab_size)
            running = []
            for one, sampling, name in zip(asked, params, names, strict=True):
                chat_format = self._chat_format(versions[name])
                prompt = tuple(one.tokens(chat_format))
                request = GenerationRequest(str(next(self._ids)), prompt, name, sampling, versions[name])
                checks.check(request)
                running.append(_Running(request, one.text, self._open.tokenizer, chat_format))
            return self._run(running)

    def _run(self, running: Sequence[_Running]) -> list[RequestOutput]:
        """Step until all have ended; whatever happens, nothing is left in the engine."""
        by_id = {each.request.request_id: each for each in running}
        try:
            for each in running:
                seed = each.request.sampling.seed
                seed = secrets.randbits(64) if seed is None else seed
                self._engine.add(each.request, each.request.version, seed, each.chat_format.eos)
            while self._engine.busy:
                for output in self._engine.step():
                    if by_id[output.request_id].push(output):
                        self._engine.abort_answer(output.request_id, output.index)
        finally:
            for request_id in by_id:
                self._engine.abort(request_id)
            while self._engine.busy:  # a step is still on the device
                self._engine.step()
            self._engine.take_ended()
        return [each.output() for each in running]

    def _hold(self, name: str | None, held: ExitStack) -> Version | None:
        """The version that answers for the name, kept until ``held`` ends."""
        if name is None:
            return None
        parts = self._open
        if self._watches and not parts.registry.serves(name):
            parts.watcher.scan_folder(name)
        version = parts.registry.checkout(name)
        held.callback(parts.registry.release, version)
        return version

    def _chat_format(self, version: Version | None) -> ChatFormat:
        return self._open.tokenizer.chat_formats.of(version.info.chat_config if version else None)

    def _sampling(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        """For each prompt, checked and as the engine takes it."""
        if given is None:
            given = SamplingParams(**self._open.info.defaults.given())  # type: ignore[arg-type]
        return [checked_sampling(one) for one in one_each("sampling_params", count, given, SamplingParams)]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt before it is known who answers.

    Attributes:
        tokens: gives its token ids, for a model that speaks so.
        text: as it was given; None = not as a text.
    """

    tokens: Callable[[ChatFormat], Sequence[int]]
    text: str | None = None


def _encode(tokenizer: Tokenizer, prompt: Prompt, _chat_format: ChatFormat) -> Sequence[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


class _Running:
    """One prompt and what has come of it so far."""

    def __init__(
        self, request: GenerationRequest, text: str | None, tokenizer: Tokenizer, chat_format: ChatFormat
    ) -> None:
        self.request = request
        self.chat_format = chat_format
        self._text = text
        answers = range(request.sampling.n)
        self._streamed = [StreamedAnswer(index, request.sampling, tokenizer) for index in answers]
        self._deltas: list[list[Delta]] = [[] for _ in answers]
        self._cached = 0

    def push(self, output: Output) -> bool:
        """Take a token; whether the engine must be told that a stop string has ended the answer.

        Raises the request's error.
        """
        if output.error is not None:
            raise output.error
        if output.index == 0 and not self._deltas[0]:
            self._cached = output.cached
        delta = self._streamed[output.index].push(output)
        self._deltas[output.index].append(delta)
        return delta.finish_reason is not None and output.reason is None

    def output(self) -> RequestOutput:
        """After the last token."""
        outputs = tuple(CompletionOutput.of(deltas) for deltas in self._deltas)
        request = self.request
        return RequestOutput(
            request.request_id, self._text, request.prompt, outputs, request.adapter, self._cached
        )


def _build(base: str | Path, folder: Path | None, options: Mapping[str, object]) -> Parts:
    if folder is not None:
        return build_parts(_config(base, folder, options))
    with tempfile.TemporaryDirectory() as empty:
        return build_parts(_config(base, Path(empty), options))


def _config(base: str | Path, folder: Path, options: Mapping[str, object]) -> ServerConfig:
    allowed = [
        option
        for option in OPTIONS
        if option.group not in _OTHER_GROUPS and option.dest not in _OTHER_OPTIONS
    ]
    others = {option.dest for option in OPTIONS} - {option.dest for option in allowed}
    for name in options.keys() & others:
        raise ConfigError(f"LLM takes no option {name!r}: it is of a server.")
    variables = {option.variable for option in allowed}
    environ = {name: value for name, value in os.environ.items() if name in variables}
    return from_options({**options, "base": base, "adapter_dir": folder}, environ)
