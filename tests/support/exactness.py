"""A mixed batch on a tiny model, compared with PEFT on the same 4-bit base.

Everything is bf16, so sums in another order differ in the last bits. ``TOLERANCE`` is the allowed difference,
as a share of the logits' standard deviation. Greedy tokens must equal PEFT's if its two best logits differ by
more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import LoadedBase, Quantization, load_base, prepare_base
from server.engine.build import Parts
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import Family, make_peft_adapter, make_tiny_model, targets_of

TOLERANCE = 0.1
ADAPTERS: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 8, "target_modules": "all-linear"},
    "attention": {"r": 3, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 12},
    "mixed-ranks": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj", "down_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 16, "down_proj": 7},
        "alpha_pattern": {"down_proj": 20},
        "use_rslora": True,
    },
}
Plan = list[tuple[str | None, int]]
"""The adapter and the prompt length of each request."""
PLAN: Plan = [
    ("everywhere", 5), (None, 37), ("attention", 70), ("mixed-ranks", 16), ("everywhere", 33), (None, 1)
]  # fmt: skip
"""Lengths on both sides of a block, of a chunk and of the sliding window. Two requests share an adapter."""


def compare_with_peft(
    family: Family,
    tmp_path: Path,
    quantization: Quantization = "nf4",
    tolerance: float = TOLERANCE,
    head: Quantization = "none",
    plan: Plan = PLAN,
) -> Parts:
    folder = make_tiny_model(family, tmp_path / family)
    prepared = prepare_base(str(folder), tmp_path, quantization, head, progress=False)
    make_adapters(family, folder, tmp_path / "adapters")
    flags = ["--quantization", quantization, "--head-quantization", head]
    parts = build(folder, tmp_path, "--max-num-batched-tokens", "64", *flags)
    requests = prompts(parts.tokenizer.vocab_size, plan)
    recorder = run_mixed(parts, requests)
    assert max(len(batch) for batch in recorder.batches) == 4, (
        "one step must have three adapters and the base"
    )
    for asked in requests:
        theirs = _peft_logits(load_base(prepared), tmp_path / "adapters", asked)
        check_close(recorder.of(asked), theirs, asked.tokens, tolerance)
    return parts


def make_adapters(family: Family, base: Path, folder: Path) -> None:
    """Save all ``ADAPTERS``. Those for Phi-3 change the linears that contain their targets, half as much."""
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        targets = targets_of(family, fields["target_modules"])
        alpha = fields.get("lora_alpha", 2 * fields["r"]) // (2 if family == "phi3" else 1)
        own = {"target_modules": targets, "lora_alpha": alpha}
        make_peft_adapter(base, folder / name, seed=seed, **{**fields, **own})


def prompts(vocabulary: int, plan: Plan = PLAN) -> list[Asked]:
    generator = torch.Generator().manual_seed(0)
    return [
        Asked(torch.randint(3, vocabulary, (n,), generator=generator).tolist(), adapter, {"ignore_eos": True})
        for adapter, n in plan
    ]


def run_mixed(parts: Parts, requests: list[Asked]) -> LogitsRecorder:
    recorder = LogitsRecorder(parts.model)
    parts.engine.model = recorder
    driver = Driver(parts)
    driver.resident(*ADAPTERS)
    driver.run(*requests)
    parts.engine.check_idle()
    parts.residency.check_integrity()
    return recorder


def _peft_logits(base: LoadedBase, folder: Path, asked: Asked) -> Tensor:
    """The logits [generated, vocabulary] of one forward pass over prompt and answer."""
    tokens = torch.tensor([asked.prompt + asked.tokens[:-1]])
    with torch.inference_mode():
        if asked.adapter is None:
            logits = base.model(tokens, use_cache=False).logits
        else:
            model = PeftModel.from_pretrained(base.model, folder / asked.adapter)
            logits = model.eval()(tokens, use_cache=False).logits
            model.unload()
    generated: Tensor = logits[0, len(asked.prompt) - 1 :].float()
    return generated


def check_close(ours: Tensor, theirs: Tensor, tokens: list[int], tolerance: float) -> float:
    """The largest difference, as a share of the logits' standard deviation."""
    scale = theirs.std().item()
    worst = ((ours - theirs).abs().max() / scale).item()
    assert worst <= tolerance
    best = theirs.topk(2).values
    sure = (best[:, 0] - best[:, 1]) > tolerance * scale
    same = theirs.argmax(-1) == torch.tensor(tokens)
    assert bool((same | ~sure).all()), "a greedy token differs although the margin is clear"
    return worst
