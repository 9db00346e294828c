"""Decode steps as CUDA graphs: recorded once for each batch size, replayed for any batch of that size.

A graph repeats its launches with the very addresses that it was recorded with. So all that varies from step
to step (tokens, pages, whose rows) lies at fixed places, which are written before each replay; how many
adapters there are, and which, does not matter.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger("manylora.engine")

MAX_GRAPH_BATCH_SIZE = 512
"""Of a graph. Larger steps take the device longer than launching them takes the host."""


class Graph(Protocol):
    """One recorded run."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record ``run``; the result is where every replay's will be."""

    def replay(self) -> None: ...


class CudaGraph:
    """See ``Graph``. All of them share one pool of memory: what a run makes lasts until the next one runs.

    Its result is kept for good, though: let all runs bring theirs to one place.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        stream = _recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles and allocates what a recording may not, cuBLAS' workspace above all
        torch.cuda.current_stream().wait_stream(stream)
        # Another thread's allocations do not end the recording: adapters may be loading.
        with torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()


@cache
def _recording_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace, of 32 MiB on an H100, for every stream that it ran on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def cuda_graphs() -> Callable[[], Graph]:
    """A maker of graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


def graph_batch_sizes(most: int) -> list[int]:
    """1, 2, 4, then every 8, to 256, then every 64: a step is padded by an eighth where it is dear."""
    steps = [1, 2, 4, *range(8, 257, 8), *range(320, most, 64)]
    return [*(n for n in steps if n < most), most]


class DecodeGraphs:
    """Graphs by (batch size, whether anybody has an adapter).

    Args:
        prepare: brings an empty step of a batch size to the places that the recorded launches read.
        run: the launches for a batch size, with the adapters' part or without.
        most: the largest batch size.
        make: a new graph.
    """

    def __init__(
        self,
        prepare: Callable[[int], None],
        run: Callable[[int, bool], Tensor],
        most: int,
        make: Callable[[], Graph],
    ) -> None:
        self._prepare, self._run, self._make = prepare, run, make
        self._most = most
        self._recorded: list[int] = []
        self._graphs: dict[tuple[int, bool], tuple[Graph, Tensor]] = {}

    def batch_size_for(self, tokens: int) -> int | None:
        """The smallest recorded batch size that holds ``tokens``; None if none does."""
        place = bisect_left(self._recorded, tokens)
        return self._recorded[place] if place < len(self._recorded) else None

    def capture_all(self) -> None:
        """Record every graph, the largest first, whose memory then does for all."""
        began = time.monotonic()
        counts = graph_batch_sizes(self._most)
        for batch_size in reversed(counts):
            self._prepare(batch_size)
            for adapted in (True, False):
                self._capture(batch_size, adapted)
        self._recorded = counts
        log.info("CUDA graphs: %d, recorded in %.1f s", len(self._graphs), time.monotonic() - began)

    def replay(self, batch_size: int, adapted: bool) -> Tensor:
        """The result of what was prepared for ``batch_size``; it lasts until the next replay is launched."""
        graph, result = self._graphs[batch_size, adapted]
        graph.replay()
        return result

    def _capture(self, batch_size: int, adapted: bool) -> None:
        graph = self._make()
        self._graphs[batch_size, adapted] = (
            graph,
            graph.capture(lambda: self._run(batch_size, adapted)),
        )
