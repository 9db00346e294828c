"""The time that calls take on the device, without the cost of launching them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from server.engine.model.cuda.product_timing import between_events

_WARM_UPS = 2


def seconds_of(calls: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """The mean seconds of one call in the fastest round of all ``calls``.

    On a GPU a round is a CUDA graph, so kernels do not wait for Python. Pass several calls on different
    data if a cache could hold the data of one call.
    """
    for _ in range(_WARM_UPS):
        for call in calls:
            call()
    if not torch.cuda.is_available():
        return min(_on_the_clock(calls) for _ in range(rounds)) / len(calls)
    replay = _recorded(calls)
    return min(between_events(replay) for _ in range(rounds)) / len(calls)


def _on_the_clock(calls: Sequence[Callable[[], object]]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay
