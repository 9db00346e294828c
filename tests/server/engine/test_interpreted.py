"""The tests that need Triton's interpreter. They share one process, because imports take most of the time."""

from __future__ import annotations

from pathlib import Path

from tests.support.triton_running import run_interpreted


def test_cases_that_launch_triton_kernels() -> None:
    cases = sorted(Path(__file__).parent.rglob("*_cases.py"))
    assert cases
    run_interpreted(*cases)
