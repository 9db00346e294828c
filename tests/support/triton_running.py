"""Tests of Triton's kernels without a GPU: run them with the interpreter, and compile them for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.project import ROOT


def run_interpreted(*cases: Path) -> None:
    """Run test files in a child process, because Triton decides at its import whether it interprets.

    On a machine with a GPU the kernels are compiled and run on it.
    """
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, cases)],
        cwd=ROOT,
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def compile_for(
    capability: int,
    function: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str | tuple[str, ...]],
    free: Collection[str],
    warps: int = 4,
) -> Any:
    """Compile a kernel for sizes and addresses that are multiples of 16, except those in ``free``.

    Args:
        types: the types of arguments, as in Triton's signatures. The default is "i32".
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    multiples = {
        path: [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in {*constants, *free}
        for path in _paths(i, signature[name])
    }
    source = ASTSource(function, signature, dict(constants), multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def _paths(i: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    return [(i, k) for k in range(len(kind))] if isinstance(kind, tuple) else [(i,)]


def check_wide(compiled: Any) -> None:
    """Check that the code reads 16 bytes at a time and never a single 16-bit value."""
    text: str = compiled.asm["ptx"]
    assert re.findall(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global .*, 0x10", text)
    assert not re.findall(r"ld\.global(?:\.v2)?\.[bu]16|cp\.async\.ca", text)
