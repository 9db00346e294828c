"""How Triton compiles the attention for GPUs. ``triton_paged_cases.py`` tests the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.attention import AttentionSpec
from tests.support.triton_running import compile_for

PLAIN, CAPPED = AttentionSpec(0.1), AttentionSpec(0.1, 4096, 50.0)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "decode", "split", "spec"),
    [
        (80, torch.float16, 64, True, True, PLAIN),
        (90, torch.bfloat16, 128, True, False, PLAIN),
        (90, torch.bfloat16, 128, False, False, PLAIN),
        (80, torch.bfloat16, 256, False, False, CAPPED),
    ],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_a_gpu_pages_are_read_in_16_bytes_and_products_use_tensor_cores(
    capability: int,
    dtype: torch.dtype,
    dim: int,
    decode: bool,
    split: bool,
    spec: AttentionSpec,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton")
    from server.engine.attention.triton_paged import SHAPE_FREE, attend_pages, form_of

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form: dict[str, Any] = form_of(dtype, 8, 4, 64, dim, spec, decode)
    warps, _ = form.pop("num_warps"), form.pop("num_stages")
    values = f"*{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
    types = {
        "out": "*fp32" if split else values, "sums": "*fp32", "q": values, "keys": values, "values": values,
        "query_starts": "*i32", "lengths": "*i32", "tables": "*i32", "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    free = [*SHAPE_FREE, "scale", "softcap"]
    compiled = compile_for(capability, attend_pages, form | {"SPLIT": split}, types, free, warps)
    text: str = compiled.asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", text)
    assert not re.search(r"ld\.global(?:\.v2)?\.[bu]16", text)
    assert re.search(r"wgmma\.mma_async" if capability == 90 and not decode else r"mma\.sync", text)
    assert compiled.metadata.shared <= 99 * 1024, (
        "the shared memory of a program on GPUs of compute capability 8.6 and 8.9"
    )


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_that_joins_splits_compiles_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from server.engine.attention.triton_paged import join_parts

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"out": "*bf16", "parts": "*fp32", "sums": "*fp32"}
    compiled = compile_for(80, join_parts, {"DIM": 128, "D": 128, "MOST": 32}, types, ["splits"])
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
