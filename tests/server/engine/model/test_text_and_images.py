"""The text model inside a base of text and images runs fused, and equals PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters.base import load_base, prepare_base
from adapters.kernels.cpu import isa
from tests.server.engine.fake_gpu import pretend
from tests.support.exactness import check_close
from tests.support.running_engine import Asked, Driver, LogitsRecorder, build
from tests.support.tiny_models import GEMMA3, make_peft_adapter, make_tiny_model

TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj|gate_proj|down_proj)"


@pytest.mark.parametrize(("gpu", "tolerance"), [(False, 0.1), (True, 0.15)])
def test_gemma3_with_images_in_a_mixed_batch(
    gpu: bool, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu:
        pretend(monkeypatch)
    elif isa() != "avx512bf16":
        pytest.skip("nothing runs fused here")
    folder = make_tiny_model("gemma3", tmp_path / "model", **GEMMA3)
    make_peft_adapter(folder, tmp_path / "adapters" / "mine", r=4, target_modules=TARGETS)
    parts = build(folder, tmp_path, "--max-num-batched-tokens", "32", "--max-num-seqs", "4")
    assert parts.model.name.startswith("fused")
    parts.engine.model = recorder = LogitsRecorder(parts.model)
    driver = Driver(parts)
    driver.resident("mine")
    prompts: list[tuple[int, str | None]] = [(41, "mine"), (20, None), (3, "mine")]
    asked = [
        Asked([(7 * i + n) % 450 + 5 for i in range(n)], adapter, {"ignore_eos": True})
        for n, adapter in prompts
    ]
    driver.run(*asked)
    prepared = prepare_base(str(folder), tmp_path, progress=False)
    for one in asked:
        model = load_base(prepared).model
        if one.adapter is not None:
            model = PeftModel.from_pretrained(model, tmp_path / "adapters" / one.adapter).eval()
        tokens = torch.tensor([one.prompt + one.tokens[:-1]])
        with torch.inference_mode():
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(one.prompt) - 1 :].float()
        check_close(recorder.of(one), logits, one.tokens, tolerance)
    parts.close()
