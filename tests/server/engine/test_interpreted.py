"""What needs Triton's interpreter: all in one process, since importing is most of the time."""

from __future__ import annotations

from pathlib import Path

from tests.support.triton_running import run_interpreted

CASES = "block_kernel_cases.py", "nf4_cases.py", "recorded_graph_cases.py", "device_graph_cases.py"


def test_cases_that_launch_triton_kernels() -> None:
    run_interpreted(*(Path(__file__).with_name(name) for name in CASES))
