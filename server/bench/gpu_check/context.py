"""What a section gets: the device, its limits, and the time when it must end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from server.bench.gpu_check.rows import Skip
from server.bench.roofline import Machine


@dataclass(frozen=True, slots=True)
class Gpu:
    """Attributes: ``memory`` is in bytes; ``machine`` holds the measured bandwidth and rate."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    machine: Machine


@dataclass(frozen=True, slots=True)
class Context:
    """Attributes:
    gpu: None = this machine has none, and the sizes are small.
    scratch: an empty folder for this section.
    ends: the end of the section's time, by ``time.monotonic``.
    """

    gpu: Gpu | None
    scratch: Path
    ends: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.gpu is None else "cuda")

    def check_time(self, needed: float = 0.0) -> None:
        """Raises ``Skip`` if fewer than ``needed`` seconds are left."""
        if time.monotonic() + needed > self.ends:
            raise Skip("out of time; set a larger --budget")
