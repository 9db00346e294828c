"""The effects of an input: the time of /health, the gap between another client's tokens, and the memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx

_NEIGHBOUR: dict[str, Any] = {
    "model": "model",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


@dataclass(slots=True)
class Cost:
    """The worst measurements, in seconds and bytes."""

    stall: float = 0.0
    gap: float = 0.0
    memory: int = 0


@contextmanager
def watched(url: str, pid: int) -> Iterator[Cost]:
    """Measure the cost of the code in the block."""
    cost, over = Cost(), Event()
    with httpx.Client(base_url=url, timeout=60) as one, httpx.Client(base_url=url, timeout=60) as other:
        probe = Thread(target=_probe, args=(one, cost, over))
        neighbour = Thread(target=_read, args=(other, cost, over))
        before = _memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # reset the peak
        for thread in (probe, neighbour):
            thread.start()
        try:
            yield cost
        finally:
            over.set()
            for thread in (probe, neighbour):
                thread.join()
    cost.memory = max(0, _memory(pid, "VmHWM") - before)


def _probe(client: httpx.Client, cost: Cost, over: Event) -> None:
    while not over.wait(0.01):
        started = time.perf_counter()
        client.get("/health").raise_for_status()
        cost.stall = max(cost.stall, time.perf_counter() - started)


def _read(client: httpx.Client, cost: Cost, over: Event) -> None:
    while not over.is_set():
        with client.stream("POST", "/v1/chat/completions", json=_NEIGHBOUR) as answer:
            if answer.status_code != 200:  # the queue is full, so the next request waits too
                time.sleep(0.01)
                continue
            last = None
            for _ in answer.iter_lines():
                now = time.perf_counter()
                cost.gap = max(cost.gap, now - last if last is not None else 0.0)
                last = now
                if over.is_set():
                    break


def _memory(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
