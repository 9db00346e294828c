"""Which product of NF4 weights is the quickest here: each is tried once at the start, on the model's weights.

Ours is left out if it fails or if its result is not the dequantised one's, for any number of rows: a wrong
kernel costs a line in the log and not an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from server.engine.model.graphs import Graph, cuda_graphs
from server.engine.model.products import (
    OURS,
    PRODUCTS,
    ROWS,
    Choice,
    Nf4Weight,
    candidates,
    dequantised,
    quickest,
)

log = logging.getLogger("manylora.engine")

Timer = Callable[[Callable[[], Tensor]], float]
"""Seconds on the device of what it is given."""

_PAST_CACHE = 128_000_000
"""Bytes of weights that a round reads where there are as many: more than any GPU's cache holds."""

_ROUNDS = 3
_EXACT = 0.02
"""Of the largest value; bf16 rounds by 0.004."""


@contextmanager
def stopwatch(device: torch.device, graphs: bool) -> Iterator[Timer | None]:
    """None = nothing is measured on this device.

    Args:
        graphs: time what a graph launches, as it will decode steps; else what is launched one by one.
    """
    if device.type != "cuda":
        yield None
        return
    new_graph = cuda_graphs() if graphs else None
    kept: list[Graph] = []  # their memory is one pool, which lasts while one of them does

    def seconds_of(run: Callable[[], Tensor]) -> float:
        again: Callable[[], object] = run
        if new_graph is None:
            run()  # compiles
        else:
            kept.append(new_graph())
            kept[-1].capture(run)
            again = kept[-1].replay
        return min(between_events(again) for _ in range(_ROUNDS))

    try:
        yield seconds_of
    finally:
        kept.clear()
        torch.cuda.empty_cache()


@torch.inference_mode()
def choose(weights: Sequence[Nf4Weight], seconds_of: Timer) -> Choice:
    """By row count, what multiplies these weights, all of one shape, in the least time."""
    some = _past_cache(weights)
    xs = [torch.randn(rows, some[0].inputs, device=some[0].packed.device).to(torch.bfloat16) for rows in ROWS]
    able = [candidates(some[0], rows) for rows in ROWS]
    trusted = all(_is_right(some[0], x) for x, names in zip(xs, able, strict=True) if OURS in names)
    chosen = []
    for x, names in zip(xs, able, strict=True):
        tried = [name for name in names if trusted or name != OURS]
        chosen.append(quickest({name: seconds_of(_round(name, some, x)) for name in tried}))
    return Choice(chosen)


def choose_by_shape(weights: Sequence[Nf4Weight], seconds_of: Timer) -> dict[tuple[int, int], Choice]:
    """By (outputs, inputs) of these weights. Logged."""
    began = time.monotonic()
    by_shape: dict[tuple[int, int], list[Nf4Weight]] = {}
    for weight in weights:
        by_shape.setdefault((weight.outputs, weight.inputs), []).append(weight)
    choices = {shape: choose(alike, seconds_of) for shape, alike in by_shape.items()}
    found = "; ".join(f"{outputs} x {inputs}: {choice}" for (outputs, inputs), choice in choices.items())
    log.info("NF4 products, measured in %.1f s: %s", time.monotonic() - began, found)
    return choices


def _past_cache(weights: Sequence[Nf4Weight]) -> list[Nf4Weight]:
    enough = -(-_PAST_CACHE // weights[0].packed.nbytes)
    return list(weights[:enough])


def _round(name: str, weights: Sequence[Nf4Weight], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for weight in weights:
            y = PRODUCTS[name](weight, x, None)
        return y

    return run


def _is_right(weight: Nf4Weight, x: Tensor) -> bool:
    """Whether our product is the dequantised one, but for rounding."""
    expected = dequantised(weight, x, None).float()
    try:
        got = PRODUCTS[OURS](weight, x, None).float()
    except Exception as error:  # a compiler's or a driver's: anything
        log.warning("The product of NF4 weights in Triton does not run here and is not used: %s", error)
        return False
    off = float((got - expected).abs().max() / expected.abs().max())
    if not off <= _EXACT:  # NaN is wrong too
        log.warning("The product of NF4 weights in Triton is off by %.3f here and is not used.", off)
        return False
    return True


def between_events(run: Callable[[], object]) -> float:
    """Seconds on the device of what ``run`` queues there."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
