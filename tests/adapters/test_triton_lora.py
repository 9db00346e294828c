"""The Triton kernels, as far as this machine can prove them.

Their results (``triton_cases.py``) are tested in a process of its own, since Triton decides at its import
whether it interprets. That they compile well for GPUs is tested without one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import kernels
from adapters.kernels import choose
from adapters.kernels.segmented import segmented_lora

CASES = Path(__file__).with_name("triton_cases.py")
SITES = 3


def test_the_kernels_equal_the_reference() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        cwd=CASES.parents[2],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_they_are_chosen_on_a_gpu_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert type(choose(gpu, torch.bfloat16)).__name__ == "TritonLora"
    assert choose(cpu, torch.float32) is segmented_lora
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    assert choose(gpu, torch.bfloat16) is segmented_lora


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float16), (90, torch.bfloat16)])
@pytest.mark.parametrize("kernel", ["gather shrink", "gather expand", "grouped shrink", "grouped expand"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_a_gpu_weights_are_read_in_16_bytes_and_dots_use_tensor_cores(
    kernel: str, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(capability, kernel, dtype)
    text: str = compiled.asm["ptx"]
    wide = re.findall(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10", text)
    narrow = re.findall(r"ld\.global(?:\.v2)?\.[bu]16|cp\.async\.ca", text)
    assert wide
    assert not narrow
    assert ("mma" in text) == kernel.startswith("grouped")
    assert compiled.metadata.shared <= 48 * 1024


def compile_for(capability: int, kernel: str, dtype: torch.dtype) -> Any:
    """For sizes and addresses that are multiples of 16, as a large model's are."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adapters.kernels.triton import GATHER, GROUPED, types_of

    form = GATHER if kernel.startswith("gather") else GROUPED
    function, constants = (
        (form.shrink, form.of_shrink) if kernel.endswith("shrink") else (form.expand, form.of_expand)
    )
    constants = {**types_of(form, dtype), **constants}
    values = f"*{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
    known: dict[str, Any] = {
        "h": "*fp32", "tiles": "*i32", "x": values, "sites": ("*i64",) * SITES, "ys": (values,) * SITES,
        "y_strides": ("i32",) * SITES, "outputs": ("i32",) * SITES,
    }  # fmt: skip
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    free = {*constants, "tokens", "width", "workers"}
    multiples = {
        path: [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in free
        for path in ([(i, k) for k in range(SITES)] if isinstance(signature[name], tuple) else [(i,)])
    }
    source = ASTSource(function, signature, constants, multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))
