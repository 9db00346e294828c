"""The default base with its sample adapters, compared with PEFT on the same 4-bit weights.

Another order of sums rounds differently in bf16, so both are compared with a float32 model with the same
dequantised weights. Our logits must be about as near to it as PEFT's. Run with ``-s`` to print the figures.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import DEFAULT_BASE, LoadedBase, PreparedBase, load_base
from tests.support.project import ROOT
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import make_peft_adapter

SAMPLES = ROOT / "adapters" / "samples"
QUESTIONS = ["What is the capital of France?", "What do bees make?", "Name a colour and say why you like it."]
AS_NEAR_AS_PEFT = 1.1
"""The limit of our mean distance from float32, divided by PEFT's."""


@dataclass
class Distances:
    """Root mean square differences, divided by the logits' standard deviation."""

    ours_to_peft: float
    ours_to_float32: float
    peft_to_float32: float


@pytest.fixture(scope="module")
def folder(default_base: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("pirate", "json-answers"):
        shutil.copytree(SAMPLES / name, folder / name)
    base = load_base(default_base.prepared)
    make_peft_adapter(base.model, folder / "random-16", r=16, seed=3, lora_alpha=8)
    return folder


def _peft(model: Any, folder: Path, asked: Asked) -> Tensor:
    tokens = torch.tensor([asked.prompt + asked.tokens[:-1]])
    with torch.inference_mode():
        if asked.adapter is None:
            logits = model(tokens, use_cache=False).logits
        else:
            adapted = PeftModel.from_pretrained(model, folder / asked.adapter)
            logits = adapted.eval()(tokens, use_cache=False).logits
            adapted.unload()
    generated: Tensor = logits[0, len(asked.prompt) - 1 :].float()
    return generated


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).square().mean().sqrt() / other.std()).item()


def _in_float32(prepared: PreparedBase) -> Any:
    return copy.deepcopy(load_base(prepared).model).dequantize().float().eval()


def test_a_mixed_batch_is_as_exact_as_peft(
    default_prepared: PreparedBase, manylora_home: Path, folder: Path
) -> None:
    flags = ["--adapter-dir", str(folder), "--kv-cache-memory", "64MiB", "--max-num-batched-tokens", "64"]
    parts = build(DEFAULT_BASE, manylora_home, *flags, "--lora-pool-rows", "32")
    names = ["pirate", "json-answers", "random-16", None]
    requests = [
        Asked(parts.tokenizer.render_chat([{"role": "user", "content": question}]), name, {"max_tokens": 12})
        for question in QUESTIONS
        for name in names
    ]
    parts.engine.model = recorder = LogitsRecorder(parts.model)
    driver = Driver(parts)
    driver.resident("pirate", "json-answers", "random-16")
    driver.run(*requests)
    assert max(len(batch) for batch in recorder.batches) == 4

    bf16, float32 = load_base(default_prepared).model, _in_float32(default_prepared)
    distances, sure = [], 0
    for asked in requests:
        ours, peft, exact = recorder.of(asked), _peft(bf16, folder, asked), _peft(float32, folder, asked)
        found = Distances(_distance(ours, peft), _distance(ours, exact), _distance(peft, exact))
        print(asked.adapter, found)
        distances.append(found)
        sure += _check_greedy(asked, ours, peft)
    assert sure > 50, "few margins are clear, so the test proves little"
    ours_mean = sum(found.ours_to_float32 for found in distances)
    assert ours_mean <= AS_NEAR_AS_PEFT * sum(found.peft_to_float32 for found in distances)


def _check_greedy(asked: Asked, ours: Tensor, peft: Tensor) -> int:
    """Check that tokens equal PEFT's where its two best logits differ by more than our largest difference."""
    best = peft.topk(2).values
    sure = best[:, 0] - best[:, 1] > (ours - peft).abs().amax(-1)
    same = peft.argmax(-1) == torch.tensor(asked.tokens)
    assert bool((same | ~sure).all()), "a greedy token differs although the margin is clear"
    return int(sure.sum())
