"""The plot of a report: decode throughput, and step time over floor, by adapters. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.bench.gpu_check.rows import Result, Value
from server.bench.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = Sequence[Mapping[str, Value]]


def draw(results: Sequence[Result], title: str, file: Path) -> bool:
    """Write the PNG. Returns False, and writes nothing, if no decode step was measured."""
    from matplotlib.figure import Figure

    decode = [row for result in results if result.name == "decode" for row in result.table("decode")]
    if not decode:
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    throughput, steps = figure.subplots(1, 2)
    for index, adapters in enumerate(sorted({int(row["adapters"]) for row in decode})):
        rows = sorted(_with(decode, adapters), key=lambda row: int(row["sequences"]))
        colour, label = COLOURS[index % len(COLOURS)], f"{adapters} adapters" if adapters else "base only"
        _line(throughput, rows, "tokens/s", "-", colour, label)
        _line(steps, rows, "step ms", "-", colour, label)
        _line(steps, rows, "floor ms", ":", colour, f"{label}: floor")
    for axes, name in ((throughput, "tokens/s"), (steps, "ms of a step")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("sequences")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150, format="png")
    return True


def _with(decode: Table, adapters: int) -> Table:
    return [row for row in decode if row["adapters"] == adapters]


def _line(axes: Axes, rows: Table, column: str, style: str, colour: str, label: str) -> None:
    points = [(row["sequences"], row[column]) for row in rows if column in row]
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=label)
