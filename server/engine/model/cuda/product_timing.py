"""Which product of NF4 weights is the quickest here: each is tried once at the start, on the model's weights.

Ours is left out if it fails or if its result is not the dequantised one's, for any of the weights and any
number of rows: a wrong kernel costs speed and not an answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from server.engine.model.cuda.graphs import Graph, cuda_graphs
from server.engine.model.cuda.products import (
    OURS,
    PRODUCTS,
    ROWS,
    USUAL,
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
    xs = [
        torch.randn(rows, weights[0].inputs, device=weights[0].packed.device).to(torch.bfloat16)
        for rows in ROWS
    ]
    able = [candidates(weights[0], rows) for rows in ROWS]
    refused = _why_wrong(weights, [x for x, names in zip(xs, able, strict=True) if OURS in names])
    some = _past_cache(weights)
    chosen = []
    for x, names in zip(xs, able, strict=True):
        taken: dict[str, float] = {}
        for name in names:
            if name == OURS and refused:
                continue
            try:
                taken[name] = seconds_of(_round(name, some, x))
            except Exception as error:  # it may run, and not be recorded in a graph
                log.warning("The product %r of NF4 weights cannot be timed here: %s", name, error)
                refused = _in_short(error) if name == OURS else refused
        if USUAL not in taken:
            return Choice((), refused)
        chosen.append(quickest(taken))
    return Choice(chosen, refused)


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


def _why_wrong(weights: Sequence[Nf4Weight], xs: Sequence[Tensor]) -> str:
    """Why our product is not the dequantised one but for rounding, for each weight and x; empty = it is."""
    if not xs:
        return ""
    together = torch.cat(list(xs))
    for weight in weights:
        expected = torch.split(dequantised(weight, together, None).float(), [len(x) for x in xs])
        reason = next(filter(None, map(partial(_why_off, weight), xs, expected)), "")
        if reason:
            return reason
    return ""


def _why_off(weight: Nf4Weight, x: Tensor, expected: Tensor) -> str:
    try:
        got = PRODUCTS[OURS](weight, x, None).float()
    except Exception as error:  # a compiler's or a driver's: anything
        return f"it does not run here: {_in_short(error)}"
    off = float((got - expected).abs().max() / expected.abs().max())
    return "" if off <= _EXACT else f"it is off by {off:.3f} at {len(x)} rows"  # NaN is wrong too


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def between_events(run: Callable[[], object]) -> float:
    """Seconds on the device of what ``run`` queues there."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
