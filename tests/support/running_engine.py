"""Real engines without HTTP and threads. They are built as in the server, and tests call each step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.config import ServerConfig, from_args
from server.engine.build import Parts, build_parts
from server.engine.engine import Model, Output
from server.engine.interface import GenerationRequest
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk
from server.engine.sync_engine import SyncEngine

_numbers = itertools.count()


def config_for(base: Path | str, home: Path, *flags: str) -> ServerConfig:
    """A config with small sizes. ``flags`` are those of ``manylora serve``."""
    sizes = ["--kv-cache-memory", "16MiB", "--max-lora-rank", "16", "--max-loras", "8", "--threads", "1"]
    return from_args(["--base", str(base), "--home", str(home), *sizes, *flags], environ={})


def build(base: Path | str, home: Path, *flags: str) -> Parts:
    """The engine's parts for ``base`` with small sizes. ``flags`` are those of ``manylora serve``."""
    config = config_for(base, home, *flags)
    parts = build_parts(config)
    for folder in config.adapters.folder.iterdir():  # just written, so the watcher would wait a moment
        parts.registry.register(folder.name, folder, replace=False)
    return parts


@dataclass
class Asked:
    """A request and its outputs."""

    prompt: list[int]
    adapter: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    request_id: str = field(default_factory=lambda: f"t{next(_numbers)}")

    @property
    def tokens(self) -> list[int]:
        return [output.token for output in self.outputs if output.error is None and output.index == 0]

    @property
    def error(self) -> Exception | None:
        return next((output.error for output in self.outputs if output.error is not None), None)


class Driver:
    """Adds requests to an engine and runs steps until they end."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._engine = SyncEngine(parts)
        self._asked: dict[str, Asked] = {}

    def add(self, asked: Asked) -> Asked:
        sampling = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "seed": 1} | asked.params))
        request = GenerationRequest(asked.request_id, tuple(asked.prompt), asked.adapter, sampling)
        version = self.parts.registry.resolve(asked.adapter) if asked.adapter else None
        self._asked[asked.request_id] = asked
        self._engine.add(request, version, seed=sampling.seed or 0)
        return asked

    def step(self) -> list[Output]:
        outputs = self._engine.step()
        for output in outputs:
            self._asked[output.request_id].outputs.append(output)
        return outputs

    def run(self, *requests: Asked, each_step: Callable[[], None] = lambda: None) -> None:
        """Add ``requests`` and run steps until the engine is idle."""
        for asked in requests:
            self.add(asked)
        deadline = time.monotonic() + 60
        while self._engine.busy:
            assert time.monotonic() < deadline, "the engine does not finish"
            self.step()
            each_step()

    def resident(self, *names: str) -> None:
        """Wait until these adapters are on the device, so that requests for them start together."""
        for name in names:
            version = self.parts.registry.resolve(name)
            while self.parts.residency.pin(version) is None:
                time.sleep(0.002)
            self.parts.residency.unpin(version.digest)


class LogitsRecorder:
    """Wraps the engine's model and keeps the logits of every sampled token for each request."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.batches: list[set[str | None]] = []
        self.logits: dict[str, list[Tensor]] = {}

    def __call__(self, chunks: SequenceOf[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        logits = self._model(chunks, prev_tokens=prev_tokens)
        self.batches.append({chunk.sequence.digest for chunk in chunks})
        rows = iter(logits)
        for chunk in chunks:
            if chunk.samples:
                self.logits.setdefault(chunk.sequence.request_id, []).append(next(rows).clone())
        return logits

    def of(self, asked: Asked) -> Tensor:
        """The logits of a request's sampled tokens, [tokens, vocabulary]."""
        return torch.stack(self.logits[asked.request_id])
