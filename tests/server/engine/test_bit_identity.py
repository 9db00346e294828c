"""In the fused step a request's tokens, logits and log-probabilities have the same bits in every batch.

Each request first runs alone. Then all run together, in small chunks, with too little KV memory, from the
prefix cache, and on two threads. No bit may differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.base import DEFAULT_BASE
from server.engine.build import Parts
from server.engine.fairness import RoundRobin
from tests.support.native_kernels import threads
from tests.support.project import ROOT
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import Family, make_peft_adapter, make_tiny_model, targets_of

SAMPLES = ROOT / "adapters" / "samples"
NO_CACHE = "--no-enable-prefix-caching"
Plan = list[tuple[str | None, int]]
"""The adapter and prompt length of each request. The lengths cross tiles, chunks and sliding windows."""


@dataclass
class Served:
    """A base with adapters, and the answer of each request alone."""

    build: Callable[..., Parts]
    plan: Plan
    names: list[str]
    max_tokens: int
    alone: list[Asked]
    logits: list[torch.Tensor]
    kv_bytes: int

    def requests(self, vocabulary: int, max_tokens: int) -> list[Asked]:
        """Every second request is sampled. The requests ask for different numbers of log-probabilities."""
        generator = torch.Generator().manual_seed(1)
        return [
            Asked(
                torch.randint(5, vocabulary, (length,), generator=generator).tolist(),
                adapter,
                {
                    "max_tokens": max_tokens,
                    "ignore_eos": True,
                    "temperature": i % 2 * 0.8,
                    "top_p": 0.9 if i % 4 == 3 else 1.0,
                    "seed": i,
                    "logprobs": i % 3,
                },
            )
            for i, (adapter, length) in enumerate(self.plan)
        ]

    def check(self, parts: Parts, turns: int = 1, max_tokens: int | None = None) -> int:
        """Run all together and compare the last turn with each alone. Returns the most adapters in a step."""
        recorder = LogitsRecorder(parts.model)
        parts.engine.model = recorder
        driver = Driver(parts)
        driver.resident(*self.names)
        for _ in range(turns):
            requests = self.requests(parts.tokenizer.vocab_size, max_tokens or self.max_tokens)
            driver.run(*requests)
        for got, expected, logits in zip(requests, self.alone, self.logits, strict=True):
            made = max_tokens or self.max_tokens
            assert got.tokens == expected.tokens[:made]
            assert [o.logprobs for o in got.outputs] == [o.logprobs for o in expected.outputs[:made]]
            assert torch.equal(recorder.of(got), logits[:made])
        return max(len(batch) for batch in recorder.batches)


def _serve(build: Callable[..., Parts], plan: Plan, max_tokens: int) -> Served:
    """Runs each request alone."""
    parts = build(NO_CACHE)
    if parts.model.name != "fused":
        pytest.skip("only the fused step guarantees this")
    recorder = LogitsRecorder(parts.model)
    parts.engine.model = recorder
    names = sorted({name for name, _ in plan if name is not None})
    kv_bytes = sum(shape.bytes_per_token(torch.bfloat16) for shape in parts.model.shapes.values())
    served = Served(build, plan, names, max_tokens, [], [], kv_bytes)
    driver = Driver(parts)
    for asked in served.requests(parts.tokenizer.vocab_size, max_tokens):
        driver.run(asked)
        served.alone.append(asked)
        served.logits.append(recorder.of(asked))
    assert max(len(batch) for batch in recorder.batches) == 1
    assert len({tuple(asked.tokens) for asked in served.alone}) == len(plan)
    return served


def _tiny(family: Family, home: Path, head: str) -> Served:
    folder = make_tiny_model(family, home / family)
    make_peft_adapter(folder, home / "adapters" / "everywhere", r=8, seed=1)
    targets = targets_of(family, ["q_proj", "down_proj"])
    make_peft_adapter(folder, home / "adapters" / "odd", r=5, seed=2, target_modules=targets)
    plan: Plan = [("everywhere", 5), (None, 37), ("odd", 70), ("everywhere", 33), (None, 1), ("odd", 16)]
    return _serve(
        lambda *flags: build(folder, home, "--head-quantization", head, *flags), plan, max_tokens=40
    )


def _default(home: Path, folder: Path) -> Served:
    for name in ("pirate", "json-answers"):
        shutil.copytree(SAMPLES / name, folder / name)

    def build_default(*flags: str) -> Parts:
        pool = ["--lora-pool-rows", "32", "--adapter-dir", str(folder)]
        return build(DEFAULT_BASE, home, *pool, *flags)

    plan: Plan = [("pirate", 30), (None, 14), ("json-answers", 31)]
    return _serve(build_default, plan, max_tokens=24)


@pytest.fixture(
    scope="module", params=["llama", "qwen3", "gemma2", "gemma2 nf4", "gemma3_text", "phi3", "default"]
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, manylora_home: Path
) -> Served:
    folder = tmp_path_factory.mktemp("bits")
    if request.param == "default":
        request.getfixturevalue("default_prepared")
        return _default(manylora_home, folder)
    family, _, head = request.param.partition(" ")
    return _tiny(family, folder, head or "none")


def test_beside_other_requests_and_adapters(served: Served) -> None:
    assert served.check(served.build(NO_CACHE)) == 3


def test_on_two_threads(served: Served) -> None:
    parts = served.build(NO_CACHE)
    with threads(2):
        served.check(parts, max_tokens=2)


def test_in_small_chunks(served: Served) -> None:
    served.check(served.build(NO_CACHE, "--max-num-batched-tokens", "11", "--max-num-seqs", "4"))


def test_after_preemption(served: Served) -> None:
    longest = max(length for _, length in served.plan) + served.max_tokens
    memory = served.kv_bytes * (-(-longest // 16) * 16)
    parts = served.build(NO_CACHE, "--kv-cache-memory", str(memory), "--max-model-len", str(longest))
    served.check(parts)
    assert parts.engine.scheduler.preemptions > 0


def test_from_the_prefix_cache(served: Served) -> None:
    parts = served.build()
    served.check(parts, turns=2)
    assert parts.engine.scheduler.cached_tokens > 0


def test_when_lanes_take_turns(served: Served) -> None:
    parts = served.build(NO_CACHE, "--max-num-seqs", "1")
    scheduler = parts.engine.scheduler
    scheduler.fairness = RoundRobin(scheduler.lanes, quantum=7, slice_tokens=8)
    served.check(parts)
    assert scheduler.preemptions > 2
