"""Runs the chat templates of adapters, which anyone may have written, in processes that can be killed.

Jinja's sandbox keeps a template from the machine, but not from computing for ever or filling the memory, and
no thread can be stopped. So such a template is rendered in a child with limits on processor time and memory;
one that breaks them is refused at once for a while, and everybody else goes on.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from adapters.text.messages import Message
from adapters.text.template import ChatTemplate, TemplateRefused

MAX_CPU_SECONDS = 2.0
"""Processor time for one rendering; templates that people use take a thousandth of it."""
MAX_MEMORY = 512 << 20
"""Bytes that a rendering may take beside the interpreter."""
MAX_TEXT = 32 << 20
"""Characters of what it renders."""
_START_SECONDS, _WALL_SECONDS = 60.0, 20.0
_PENALTY_SECONDS = 60.0
_CHILD = "adapters.text.sandbox_child"
_BROKE = f"it takes more than {MAX_CPU_SECONDS:g} s or {MAX_MEMORY >> 20} MiB"


class TemplateTooSlow(TemplateRefused):
    """It broke a limit, and was killed."""


class TemplateSandbox:
    """A few children, each started when it is first needed. Thread-safe.

    Args:
        size: renderings at once; one more waits.
    """

    def __init__(self, size: int = 2) -> None:
        self._children: queue.Queue[_Child] = queue.Queue()
        self._all = [_Child() for _ in range(size)]
        for child in self._all:
            self._children.put(child)
        self._refused_until: dict[str, float] = {}

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        seconds: float = MAX_CPU_SECONDS,
    ) -> str:
        """The conversation as text, in so much processor time.

        Raises TemplateRefused; TemplateTooSlow is remembered if the template had all of the usual time.
        """
        if time.monotonic() < self._refused_until.get(template.source, 0.0):
            raise TemplateTooSlow(f"{_BROKE}; it is tried again in a minute")
        request = {
            "source": template.source,
            "variables": dict(template.variables),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "seconds": seconds,
        }
        child = self._children.get()
        try:
            answer = child.ask(request)
        finally:
            self._children.put(child)
        if answer is None:
            if seconds >= MAX_CPU_SECONDS:
                self._refuse(template.source)
            raise TemplateTooSlow(_BROKE)
        if "refused" in answer:
            raise TemplateRefused(answer["refused"])
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the children."""
        for child in self._all:
            child.kill()

    def _refuse(self, source: str) -> None:
        now = time.monotonic()
        kept = {text: until for text, until in list(self._refused_until.items()) if until > now}
        self._refused_until = kept | {source: now + _PENALTY_SECONDS}


@dataclass(frozen=True)
class SandboxedTemplate(ChatTemplate):
    """A template that is rendered in a child.

    Attributes:
        sandbox: whose children.
    """

    sandbox: TemplateSandbox = field(default_factory=TemplateSandbox, hash=False, compare=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises TemplateRefused."""
        return self.sandbox.render(self, messages, add_generation_prompt)


class _Child:
    """One process; only one thread asks at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Its answer; None if it broke a limit: then the next is on its way."""
        process = self._started()
        if not self._ready and self._line(process, _START_SECONDS) is None:
            self.kill()
            raise TemplateRefused("the process that renders templates of adapters cannot be started")
        self._ready = True
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # killed for its memory while it read: the line below says so
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        line = self._line(process, _WALL_SECONDS)
        if line is None:
            self.kill()
            self._started()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._process = _start()
        return self._process

    def kill(self) -> None:
        """Whatever it does."""
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
            process.wait()

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """One line of its output; None if there is none in time."""
        assert process.stdout is not None
        descriptor, deadline = process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()  # select() takes no descriptor beyond 1023, and a server may have many
        poll.register(descriptor, select.POLLIN)
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            piece = os.read(descriptor, 1 << 20) if ready else b""
            if not piece:
                return None
            pieces.append(piece)
        return b"".join(pieces)


def _start() -> subprocess.Popen[bytes]:
    """With nothing of our environment: there may be keys in it."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ", "SYSTEMROOT") if name in os.environ}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def _close(pipe: Any) -> None:
    with suppress(BrokenPipeError):
        pipe.close()
