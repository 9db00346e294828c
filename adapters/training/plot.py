"""Plots the loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_WINDOW = 10


def draw_losses(file: Path, training: Mapping[int, float], held_out: Mapping[int, float]) -> None:
    """Write a PNG with the loss of each step, its moving mean, and the held-out loss, by step."""
    from matplotlib.figure import Figure  # the import takes a second

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = sorted(training)
    axes.plot(steps, [training[step] for step in steps], color="#0072B2", alpha=0.3, linewidth=1)
    axes.plot(steps, _smoothed([training[step] for step in steps]), color="#0072B2", label="training")
    if held_out:
        places = sorted(held_out)
        axes.plot(places, [held_out[step] for step in places], "o-", color="#D55E00", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats an assistant token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png")


def _smoothed(values: list[float]) -> list[float]:
    """The mean of the last ``_WINDOW`` values at each position."""
    windows = (values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
