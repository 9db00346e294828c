"""Decode steps as CUDA graphs: recorded once for each batch size, replayed for any batch of that size.

A graph repeats its launches with the addresses that it was recorded with. So everything that varies from step
to step (tokens, pages, adapter rows) is at fixed addresses, which are written before each replay. One graph
serves any number of adapters.
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
"""Most sequences in a graph. For larger steps, launching takes the host less time than computing them."""


class Graph(Protocol):
    """One recorded run."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record ``run``; returns the tensor that every replay writes its result to."""

    def replay(self) -> None: ...


class CudaGraph:
    """See ``Graph``. All graphs share one memory pool, so a run's tensors last until the next run.

    The result of each graph stays allocated, so all runs should write theirs to one tensor.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        stream = _recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles, and allocates what a capture may not: above all cuBLAS' workspace
        torch.cuda.current_stream().wait_stream(stream)
        # Allocations of other threads do not end the capture: adapters may be loading.
        with torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()


@cache
def _recording_stream() -> torch.cuda.Stream:
    """One stream for all graphs: cuBLAS keeps a workspace for each stream, of 32 MiB on an H100."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def cuda_graphs() -> Callable[[], Graph]:
    """A factory of graphs that share their memory."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


def graph_batch_sizes(most: int) -> list[int]:
    """1, 2, 4, then every 8 up to 256, then every 64: large steps are padded by a quarter at most."""
    steps = [1, 2, 4, *range(8, 257, 8), *range(320, most, 64)]
    return [*(n for n in steps if n < most), most]


class DecodeGraphs:
    """Graphs by (batch size, whether any sequence has an adapter).

    Args:
        prepare: writes an empty step of a batch size to the addresses that the recorded launches read.
        run: makes the launches for a batch size, with or without LoRA.
        most: the largest batch size.
        make: makes an empty graph.
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
        index = bisect_left(self._recorded, tokens)
        return self._recorded[index] if index < len(self._recorded) else None

    def capture_all(self) -> None:
        """Record every graph, the largest first; the others reuse its memory."""
        began = time.monotonic()
        counts = graph_batch_sizes(self._most)
        for batch_size in reversed(counts):
            self._prepare(batch_size)
            for adapted in (True, False):
                self._capture(batch_size, adapted)
        self._recorded = counts
        log.info("CUDA graphs: %d, recorded in %.1f s", len(self._graphs), time.monotonic() - began)

    def replay(self, batch_size: int, adapted: bool) -> Tensor:
        """The result of the prepared step; valid until the next replay is launched."""
        graph, result = self._graphs[batch_size, adapted]
        graph.replay()
        return result

    def _capture(self, batch_size: int, adapted: bool) -> None:
        graph = self._make()
        self._graphs[batch_size, adapted] = (
            graph,
            graph.capture(lambda: self._run(batch_size, adapted)),
        )
