"""Times the products of NF4 weights at the start, on the model's own weights, and chooses the quickest.

Our kernel is not used if it fails, or if its result differs from the dequantised product, for any weight and
any number of rows. A wrong kernel costs speed, never a wrong answer.
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
"""Measures the seconds that a callable takes on the device."""

_PAST_CACHE = 128_000_000
"""Bytes of weights that a round reads, if the model has as many: more than any GPU's cache holds."""

_ROUNDS = 3
_EXACT = 0.02
"""Largest error, relative to the largest value; bf16 rounds by 0.004."""


@contextmanager
def stopwatch(device: torch.device, graphs: bool) -> Iterator[Timer | None]:
    """A timer for this device; None = nothing is measured on it.

    Args:
        graphs: time launches in a CUDA graph, as decode steps use them; else single launches.
    """
    if device.type != "cuda":
        yield None
        return
    new_graph = cuda_graphs() if graphs else None
    kept: list[Graph] = []  # they share a memory pool, which lives as long as one of them

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
    """The quickest product for each row count; all weights have one shape."""
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
            except Exception as error:  # it may run but fail to be captured in a graph
                log.warning("The product %r of NF4 weights cannot be timed here: %s", name, error)
                refused = _in_short(error) if name == OURS else refused
        if USUAL not in taken:
            return Choice((), refused)
        chosen.append(quickest(taken))
    return Choice(chosen, refused)


def choose_by_shape(weights: Sequence[Nf4Weight], seconds_of: Timer) -> dict[tuple[int, int], Choice]:
    """``choose`` for each (outputs, inputs) of these weights; logs the choices."""
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
    """Why our product is wrong beyond rounding for some weight and x; empty = it is right."""
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
    except Exception as error:  # any exception of a compiler or a driver
        return f"it does not run here: {_in_short(error)}"
    off = float((got - expected).abs().max() / expected.abs().max())
    return "" if off <= _EXACT else f"it is off by {off:.3f} at {len(x)} rows"  # NaN is wrong too


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def between_events(run: Callable[[], object]) -> float:
    """Seconds that the device takes for what ``run`` queues."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
