"""The servers that are measured, manylora among them. A runner starts each as a process of its own.

To add a peer, write ``peers/<name>.py`` with a class that fits ``Runner`` and add it to ``peer``. For an HTTP
server, derive from ``http.HttpServer`` and define ``command``. If it needs an environment of its own, add it
to ``environments.RECIPES``.
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
    """The same for every runner of a comparison.

    Attributes:
        base: folder of the prepared 4-bit checkpoint.
        adapters: name → PEFT folder.
        scratch: a folder for logs and state. It is deleted after the comparison.
        source: the model that the base was prepared from (``--base``).
        home: the state folder, with the peers' environments in it.
        slots: most requests in flight, for servers that need to know.
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
    """The same base in bf16, for peers that quantise in their own way or not at all.

    Raises ``BaseModelError`` if the source is quantised already.
    """
    from adapters.base import prepare_base

    return prepare_base(setup.source, setup.home, quantization="none", progress=False)


class Runner(Protocol):
    """Something that answers workloads. ``start`` and ``run`` raise ``BenchError``."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """Its first process, once started; None if it was not started here."""

    def start(self, setup: Setup) -> None:
        """Start, load the base and register the adapters."""

    def run(self, workload: Workload) -> RunResult:
        """Answer every call. A call that fails gives a record with an error."""

    def stop(self) -> None:
        """End the process, if it was started."""


def peer(name: str) -> Runner:
    """The runner of ``name``: one of ``PEERS``, optionally followed by ``:variant``."""
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
            raise BenchError(f"unknown peer {name!r}; choose from: {', '.join(PEERS)}")
