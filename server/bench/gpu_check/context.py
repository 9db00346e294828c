"""What a section knows while it runs: the device, its limits, and the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from server.bench.gpu_check.rows import Skip
from server.bench.roofline import Machine


@dataclass(frozen=True, slots=True)
class Gpu:
    """Attributes: ``memory`` and ``free`` in bytes; ``machine`` is measured."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    machine: Machine


@dataclass(frozen=True, slots=True)
class Context:
    """Attributes:
    gpu: None = none here, and everything runs small.
    scratch: an empty folder of this section's.
    ends: when its time is up, by ``time.monotonic``.
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
            raise Skip("out of time; give it more with --budget")
