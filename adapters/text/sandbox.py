"""Runs adapters' chat templates, which are untrusted, in processes that can be killed.

Jinja's sandbox protects the machine, but it does not stop a template from running forever or filling the
memory, and a thread cannot be killed. So adapters' templates are rendered in a child process with limits on
CPU time and memory. A template that exceeds them is refused at once for a while. Other requests are not
affected.
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
"""CPU seconds of one rendering. Common templates take a thousandth of that."""
MAX_MEMORY = 512 << 20
"""Bytes that a rendering may use in addition to the interpreter."""
MAX_TEXT = 32 << 20
"""Characters of the rendered text."""
_START_SECONDS, _WALL_SECONDS = 60.0, 20.0
_PENALTY_SECONDS = 60.0
_CHILD = "adapters.text.sandbox_child"
_BROKE = f"it takes more than {MAX_CPU_SECONDS:g} s or {MAX_MEMORY >> 20} MiB"


class TemplateTooSlow(TemplateRefused):
    """The template exceeded a limit and was killed."""


class TemplateSandbox:
    """A pool of child processes, each started when it is first needed. Thread-safe.

    Args:
        size: the number of concurrent renderings. Further ones wait.
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
        """The conversation as text, rendered within ``seconds`` of CPU time.

        Raises TemplateRefused. TemplateTooSlow is remembered if the template had the full time limit.
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
        """Stop the children."""
        for child in self._all:
            child.kill()

    def _refuse(self, source: str) -> None:
        now = time.monotonic()
        kept = {text: until for text, until in list(self._refused_until.items()) if until > now}
        self._refused_until = kept | {source: now + _PENALTY_SECONDS}


@dataclass(frozen=True)
class SandboxedTemplate(ChatTemplate):
    """A template that is rendered in a child process of ``sandbox``.

    Attributes:
        sandbox: the pool of children.
    """

    sandbox: TemplateSandbox = field(default_factory=TemplateSandbox, hash=False, compare=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises TemplateRefused."""
        return self.sandbox.render(self, messages, add_generation_prompt)


class _Child:
    """One child process. Only one thread uses it at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The child's answer. None if it exceeded a limit; a new child is then started."""
        process = self._started()
        if not self._ready and self._line(process, _START_SECONDS) is None:
            self.kill()
            raise TemplateRefused("the process that renders templates of adapters cannot be started")
        self._ready = True
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # killed while it read; handled below
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
        """Kill the child, whatever it is doing."""
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
            process.wait()

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """One line of its output; None on a timeout."""
        assert process.stdout is not None
        descriptor, deadline = process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()  # select() fails for descriptors above 1023, and a server may have more
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
    """Start a child with almost no environment, because the server's may contain keys."""
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
