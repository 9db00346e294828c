"""Sequences and schedulers for tests that need no torch model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from adapters.artifact import AdapterInfo
from adapters.registry import Version
from server.engine.kv_cache import BlockManager
from server.engine.sampling_params import SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence

_numbers = itertools.count()


def make_version(name: str, digest: str | None = None, ranks: dict[str, int] | None = None) -> Version:
    info = AdapterInfo(digest or f"digest-of-{name}", ranks or {"a": 4}, 1000, None, ())
    return Version(name=name, digest=info.digest, path=Path(name), info=info, created=0.0)


def make_sequence(
    prompt: int | list[int] = 5, adapter: str | Version | None = None, **params: Any
) -> Sequence:
    """A sequence with a prompt of ``prompt`` distinct tokens, or of exactly these tokens."""
    number = next(_numbers)
    tokens = list(range(1000 * number, 1000 * number + prompt)) if isinstance(prompt, int) else prompt
    version = make_version(adapter) if isinstance(adapter, str) else adapter
    sampling = SamplingParams(**({"max_tokens": 1000} | params))
    return Sequence(f"r{number}", 0, tuple(tokens), version, sampling, 0, number, frozenset({2}))


class OpenGate:
    """Admits all adapters except those named in ``cold``."""

    def __init__(self, cold: set[str] | None = None) -> None:
        self.cold = cold or set()
        self.pinned: set[Sequence] = set()

    @property
    def pins(self) -> int:
        return len(self.pinned)

    def prepare(self, sequence: Sequence) -> bool:
        return sequence.adapter is None or sequence.adapter.name not in self.cold

    def admit(self, sequence: Sequence) -> bool:
        if not self.prepare(sequence):
            return False
        assert sequence not in self.pinned, "a sequence must not pin twice"
        self.pinned.add(sequence)
        sequence.slot = 0 if sequence.adapter is not None else -1
        return True

    def leave(self, sequence: Sequence) -> None:
        self.pinned.discard(sequence)


def make_scheduler(
    blocks: int = 64, block_size: int = 4, seqs: int = 8, budget: int = 32, gate: OpenGate | None = None
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=blocks * block_size
    )
    return Scheduler(limits, BlockManager(blocks, block_size), gate or OpenGate())
