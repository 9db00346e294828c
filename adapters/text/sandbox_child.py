"""The child process of ``sandbox.py``. It reads a line of JSON and writes a line of JSON, within limits.

Exceeding a limit ends the process. It has no state to lose.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any

from adapters.text.sandbox import MAX_MEMORY, MAX_TEXT
from adapters.text.template import ChatTemplate, TemplateRefused


def main() -> None:
    """Answer requests until the parent exits."""
    _limit()
    _answer({"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF kills
        answer = _rendered(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(answer)


def _rendered(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = ChatTemplate(request["source"], request["variables"])
        text = template.render(request["messages"], request["add_generation_prompt"])
    except TemplateRefused as error:
        if isinstance(error.__cause__, MemoryError):
            return {"refused": f"it takes more than {MAX_MEMORY >> 20} MiB"}
        return {"refused": str(error)[:1000]}
    if len(text) > MAX_TEXT:
        return {"refused": f"it renders {len(text)} characters; at most {MAX_TEXT} are allowed"}
    return {"text": text}


def _limit() -> None:
    """Limit the memory beyond the interpreter's, and forbid files."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
