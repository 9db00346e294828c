"""What is measured: a runner a server, ours among them. Each is one file, started as a process of its own.

To add a peer: write ``peers/<name>.py`` with a class that fits ``Runner`` (for an HTTP server:
``http.HttpServer`` with a ``command``), and name it in ``peer``; if it needs an environment of its own,
``environments.RECIPES`` says how that is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from server.bench.errors import BenchError
from server.bench.serving.stats import RunResult
from server.bench.serving.workload import Workload

if TYPE_CHECKING:
    from adapters.base import PreparedBase

PEERS = ("llama.cpp", "vllm", "peft")


@dataclass(frozen=True, slots=True)
class Setup:
    """What every runner of a comparison is given alike.

    Attributes:
        base: folder of the prepared 4-bit checkpoint.
        adapters: name → PEFT folder.
        scratch: a folder for logs and state that ends with the comparison.
        source: what the base was prepared from, as ``--base`` names it.
        home: the state folder, with the peers' environments in it.
        slots: most requests in flight, for servers that must be told.
        context: most tokens of a request, prompt and answer.
    """

    base: Path
    adapters: Mapping[str, Path]
    scratch: Path
    source: str
    home: Path
    slots: int
    context: int


def dense_base(setup: Setup) -> PreparedBase:
    """The same base before our quantisation, in bf16, for peers that quantise in their own way or not at all.

    Raises ``BaseModelError`` where the source is quantised already.
    """
    from adapters.base import prepare_base

    return prepare_base(setup.source, setup.home, quantization="none", progress=False)


class Runner(Protocol):
    """Something that answers workloads. ``start`` and ``run`` raise ``BenchError``."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """Its first process, once started; None where that is not ours to look into."""

    def start(self, setup: Setup) -> None:
        """Be ready to answer: the base loaded, the adapters known."""

    def run(self, workload: Workload) -> RunResult:
        """Answer every call; a call that fails is a record with an error."""

    def stop(self) -> None:
        """End the process; harmless when it never started."""


def peer(name: str) -> Runner:
    """The runner of ``name``: one of ``PEERS``, with ``:variant`` after it where the peer has some."""
    kind, _, variant = name.partition(":")
    match kind:
        case "llama.cpp":
            from server.bench.peers.llama_cpp import LlamaCppPeer

            return LlamaCppPeer(variant)
        case "vllm":
            from server.bench.peers.vllm import VllmPeer

            return VllmPeer(variant)
        case "peft" if not variant:
            from server.bench.peers.peft import PeftPeer

            return PeftPeer()
        case _:
            raise BenchError(f"unknown peer {name!r}; known ones: {', '.join(PEERS)}")
