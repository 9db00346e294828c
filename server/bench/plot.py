"""Plots a sweep as PNG. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.errors import BenchError
from server.bench.serving.report import Spread, spreads
from server.bench.serving.sweep import Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # distinguishable with colour blindness
_LATENCIES = {"ttft": "time to first token, ms", "itl": "inter-token latency, ms"}


def check_available() -> None:
    """Raises ``BenchError`` if matplotlib is not installed. Call it before measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError(
            "--plot needs matplotlib, which is not installed; run: pip install matplotlib"
        ) from None


def draw(sweep: Sweep, file: Path) -> None:
    """Write the plot to ``file``: throughput over adapters, or latency percentiles over the load."""
    from matplotlib.figure import Figure

    if sweep.axis.kind == "adapters":
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _throughput(figure.subplots(), sweep)
    else:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2), _LATENCIES, strict=True):
            _latency(axes, sweep, kind)
    figure.savefig(file, dpi=150, format="png")


def _throughput(axes: Axes, sweep: Sweep) -> None:
    """The median as a line, minimum to maximum as a band."""
    for index, name in enumerate(_names(sweep)):
        places, values = _series(sweep, index, "output_throughput")
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)]}
        axes.plot(places, [value.median for value in values], marker="o", label=name, **style)
        low, high = [value.min for value in values], [value.max for value in values]
        axes.fill_between(places, low, high, alpha=0.2, linewidth=0, **style)
    axes.set_xscale("log", base=2)
    ticks = [point.at for point in sweep.points]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    _label(axes, sweep, "output tokens/s")


def _latency(axes: Axes, sweep: Sweep, kind: str) -> None:
    """The medians of P50 as a full line, those of P99 as a dashed line."""
    for index, name in enumerate(_names(sweep)):
        for percentile, style in (("p50", "-"), ("p99", "--")):
            places, values = _series(sweep, index, f"{percentile}_{kind}_ms")
            axes.plot(
                places,
                [value.median for value in values],
                style,
                marker="o",
                color=COLOURS[index % len(COLOURS)],
                label=f"{name} {percentile.upper()}",
            )
    axes.set_yscale("log")
    _label(axes, sweep, _LATENCIES[kind])


def _label(axes: Axes, sweep: Sweep, y_label: str) -> None:
    axes.set_xlabel(sweep.axis.label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()


def _names(sweep: Sweep) -> list[str]:
    return [one.name for one in sweep.points[0].measured]


def _series(sweep: Sweep, server: int, figure: str) -> tuple[list[float], list[Spread]]:
    """The points at which the server has the figure, and its values there."""
    found = [(point.at, _figure(point, server, figure)) for point in sweep.points]
    return [at for at, value in found if value], [value for _, value in found if value]


def _figure(point: Point, server: int, figure: str) -> Spread | None:
    return spreads(point.measured[server]).get(figure)
