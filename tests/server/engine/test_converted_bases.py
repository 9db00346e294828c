"""Bases that are converted to a class of transformers are served, with adapters on that class's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.base import prepare_base
from server.engine.offline import LLM, SamplingParams
from tests.support.original_models import ORIGINALS, make_original
from tests.support.tiny_models import make_peft_adapter


@pytest.mark.parametrize("case", ORIGINALS)
def test_served_with_adapters_on_the_native_names(case: str, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", make_original(case, tmp_path / "model")
    native = prepare_base(str(folder), home, "none", progress=False).path
    targets = ["q_proj", "o_proj", "down_proj"]
    make_peft_adapter(native, tmp_path / "native", r=4, seed=1, target_modules=targets)
    sizes: dict[str, Any] = {"kv_cache_memory": "8MiB", "threads": 1, "home": home}
    with LLM(folder, {"native": tmp_path / "native"}, **sizes) as llm:  # the check at the start compares
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        base, adapted = llm.generate(["lora rank"] * 2, params, [None, "native"])
    assert base.outputs[0].token_ids != adapted.outputs[0].token_ids
