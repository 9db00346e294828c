"""``manylora bench roofline``: models a decode step on a device, without measuring anything.

Bytes and operations are counted as in ``roofline.py``. The last line adds 2 and 3 us for each launch, which
is the overhead of a kernel in a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from server.bench.roofline import (
    DEVICES,
    WEIGHT_BYTES,
    Machine,
    Stack,
    Step,
    floor,
    launches,
    llama_stack,
    works,
)
from server.bench.shapes import SHAPES
from server.bench.table import align
from server.config.values import argument, integer

_LAUNCH_S = (2e-6, 3e-6)


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``manylora bench roofline``."""
    parser = kinds.add_parser("roofline", help="model a decode step on a GPU", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="h100", help="(default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="(default: %(default)s)")
    parser.add_argument(
        "--weights", choices=WEIGHT_BYTES, default="nf4, scales in float32", help="(default: %(default)s)"
    )
    for flag, least, default, metavar in (
        ("--sequences", 1, 64, "N"),
        ("--adapters", 0, 64, "N"),
        ("--rank", 1, 16, "R"),
        ("--context", 1, 256, "TOKENS"),
    ):
        parser.add_argument(
            flag,
            type=argument(integer(least)),
            default=default,
            metavar=metavar,
            help="(default: %(default)s)",
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Returns exit code 0."""
    stack, machine = llama_stack(SHAPES[arguments.shape]), DEVICES[arguments.device]
    distinct = min(arguments.adapters, arguments.sequences)
    step = Step(
        sequences=arguments.sequences,
        context=arguments.context,
        read_ranks=arguments.rank * distinct,
        used_ranks=arguments.rank * arguments.sequences if distinct else 0,
    )
    print(
        f"a model, not a measurement: {arguments.shape} ({arguments.weights}) on {arguments.device}, "
        f"{arguments.sequences} sequences of {arguments.context} tokens, "
        f"{distinct} distinct adapters of rank {arguments.rank}"
    )
    print(align([["", "MB", "GFLOP", "floor, ms"], *_rows(stack, step, machine, arguments.weights)]))
    count = launches(stack, bool(distinct))
    least = floor(works(stack, step, WEIGHT_BYTES[arguments.weights]), machine)
    low, high = ((least + count * each) * 1e3 for each in _LAUNCH_S)
    print(f"with {count} launches of 2 to 3 us: {low:.2f} to {high:.2f} ms")
    return 0


def _rows(stack: Stack, step: Step, machine: Machine, weights: str) -> Iterator[list[str]]:
    parts = works(stack, step, WEIGHT_BYTES[weights])
    for name, work in parts.items():
        yield _row(name, work.nbytes, work.operations, work.floor(machine))
    nbytes, operations = (
        sum(getattr(w, field) for w in parts.values()) for field in ("nbytes", "operations")
    )
    yield _row("step", nbytes, operations, floor(parts, machine))


def _row(name: str, nbytes: float, operations: float, seconds: float) -> list[str]:
    return [name, f"{nbytes / 1e6:.0f}", f"{operations / 1e9:.0f}", f"{seconds * 1e3:.3f}"]
