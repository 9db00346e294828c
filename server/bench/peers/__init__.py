"""What is measured: a runner a server, ours among them. Each is one file, started as a process of its own.

To add a peer: write ``peers/<name>.py`` with a class that fits ``Runner`` (for an HTTP server:
``http.HttpServer`` with a ``command``), and name it in ``peer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.bench.errors import BenchError
from server.bench.stats import RunResult
from server.bench.workload import Workload

PEERS = ("peft",)


@dataclass(frozen=True, slots=True)
class Setup:
    """What every runner of a comparison is given alike.

    Attributes:
        base: folder of the prepared 4-bit checkpoint.
        adapters: name → PEFT folder.
        scratch: a folder for logs and state that ends with the comparison.
    """

    base: Path
    adapters: Mapping[str, Path]
    scratch: Path


class Runner(Protocol):
    """Something that answers workloads. ``start`` and ``run`` raise ``BenchError``."""

    @property
    def name(self) -> str: ...

    def start(self, setup: Setup) -> None:
        """Be ready to answer: the base loaded, the adapters known."""

    def run(self, workload: Workload) -> RunResult:
        """Answer every call; a call that fails is a record with an error."""

    def stop(self) -> None:
        """End the process; harmless when it never started."""


def peer(name: str) -> Runner:
    """The runner of that peer, one of ``PEERS``."""
    match name:
        case "peft":
            from server.bench.peers.peft import PeftPeer

            return PeftPeer()
        case _:
            raise BenchError(f"unknown peer {name!r}; known ones: {', '.join(PEERS)}")
