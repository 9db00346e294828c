"""The Triton kernels, as far as this machine can test them.

A child process tests their results (``triton_cases.py``), because Triton decides at its import whether it
interprets. The compiled code for GPUs is tested without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import kernels
from adapters.kernels import choose
from adapters.kernels.segmented import segmented_lora
from tests.support.triton_running import check_wide, compile_for, run_interpreted

CASES = Path(__file__).with_name("triton_cases.py")
SITES = 3


def test_the_kernels_equal_the_reference() -> None:
    run_interpreted(CASES)


def test_they_are_chosen_on_a_gpu_if_triton_is_installed_and_correct(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(kernels, "_why_not_triton", lambda *_: None)
    assert type(choose(gpu, torch.bfloat16)).__name__ == "TritonLora"
    assert choose(cpu, torch.float32) is segmented_lora
    monkeypatch.setattr(kernels, "_why_not_triton", lambda *_: "it fails: Failed to find C compiler")
    assert choose(gpu, torch.bfloat16) is segmented_lora
    assert "without Triton, which is several times slower: it fails: Failed to find C compiler" in caplog.text
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    assert choose(gpu, torch.bfloat16) is segmented_lora


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float16), (90, torch.bfloat16)])
@pytest.mark.parametrize("kernel", ["gather shrink", "gather expand", "grouped shrink", "grouped expand"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_a_gpu_weights_are_read_in_16_bytes_and_dots_use_tensor_cores(
    kernel: str, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_kernel(capability, kernel, dtype)
    check_wide(compiled)
    assert ("mma" in compiled.asm["ptx"]) == kernel.startswith("grouped")
    assert compiled.metadata.shared <= 48 * 1024


def compiled_kernel(capability: int, kernel: str, dtype: torch.dtype) -> Any:
    """For sizes and addresses that are multiples of 16, as those of large models are."""
    pytest.importorskip("triton")
    from adapters.kernels.triton import GATHER, GROUPED, expand_constants, types_of

    form = GATHER if kernel.startswith("gather") else GROUPED
    function, constants = (
        (form.shrink, form.of_shrink)
        if kernel.endswith("shrink")
        else (form.expand, expand_constants(form, 8))
    )
    values = f"*{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
    types: dict[str, str | tuple[str, ...]] = {
        "h": "*fp32", "tiles": "*i32", "x": values, "sites": ("*i64",) * SITES, "ys": (values,) * SITES,
        "y_strides": ("i32",) * SITES, "outputs": ("i32",) * SITES,
    }  # fmt: skip
    free = ("tokens", "width", "workers")
    return compile_for(capability, function, types_of(form, dtype) | dict(constants), types, free, form.warps)
