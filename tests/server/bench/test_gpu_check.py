"""``manylora bench gpu-check`` without a GPU and without most packages, as on a new GPU machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from server.bench.gpu_check.sections import SECTIONS
from tests.support.project import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, run the command itself")

MISSING = [
    "bitsandbytes", "flash_attn", "gguf", "httptools", "openai", "prometheus_client", "pydantic",
    "python_multipart", "sqlalchemy", "starlette", "uvicorn", "uvloop",
]  # fmt: skip
"""Packages that a machine with only torch, transformers and PEFT lacks."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run for all tests, and the folder of its report and plot."""
    folder = tmp_path_factory.mktemp("gpu-check")
    absent = f"import sys\nfor name in {MISSING}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(absent)
    command = [sys.executable, "-m", "server.cli", "bench", "gpu-check"]
    files = ["--output", str(folder / "report.json"), "--plot", str(folder / "report.png")]
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [*command, *files], cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False
    )
    return done, folder


@pytest.fixture
def report(run: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run[1] / "report.json").read_text())
    return document


def rows(report: dict[str, Any], section: str, table: str) -> list[dict[str, Any]]:
    found = next(one for one in report["sections"] if one["section"] == section)
    return [row for row in found["rows"] if row["table"] == table and "skipped" not in row]


def test_without_a_gpu_one_line_says_so_and_nothing_fails(
    run: tuple[subprocess.CompletedProcess[str], Path], report: dict[str, Any]
) -> None:
    assert run[0].returncode == 0, run[0].stdout + run[0].stderr
    assert (
        "skipped: torch sees no GPU: the sections run with small sizes on the CPU"
        in run[0].stdout.splitlines()
    )
    assert "nothing failed" in run[0].stdout
    assert report["gpu"] is None
    assert report["targets"] == []
    assert [one["section"] for one in report["sections"]] == [section.name for section in SECTIONS]
    assert (run[1] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_sections_name_the_missing_packages(report: dict[str, Any]) -> None:
    skips = [row["skipped"] for one in report["sections"] for row in one["rows"] if "skipped" in row]
    assert "bitsandbytes is not installed" in skips
    assert "tiny, nf4: bitsandbytes is not installed, so there are no NF4 bases" in skips
    assert any(skip.startswith("flash-attn: ") for skip in skips)


def test_kernels_are_interpreted_and_equal_the_reference(report: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    assert len(rows(report, "lora_kernels", "equal to the reference")) == 3
    assert len(rows(report, "block_kernels", "equal to the reference")) == 14
    assert [row["rows"] for row in rows(report, "nf4_products", "products")] == [1, 8]
    layers = [row["layer"] for row in rows(report, "attention", "equal to gathered pages")]
    assert layers == ["plain", "window", "softcap"]


def test_a_whole_model_is_served_and_equals_peft(report: dict[str, Any]) -> None:
    (graphs,) = rows(report, "exactness", "graphs")
    assert graphs["equal"] == graphs["sequences"] == 14
    (peft,) = rows(report, "exactness", "PEFT")
    assert peft["sequences"] == 6
    assert peft["tokens compared"] > 6 * 4


def test_steps_and_loads_are_timed(report: dict[str, Any]) -> None:
    decode = rows(report, "decode", "decode")
    assert {(row["sequences"], row["adapters"]) for row in decode} == {(4, 4), (1, 4), (4, 0), (1, 0)}
    assert all(row["tokens/s"] > 0 for row in decode)
    assert [row["from"] for row in rows(report, "loads", "loads")] == ["disk", "host"]
    assert [row["adapters"] for row in rows(report, "loads", "first tokens")] == ["all fit", "half fit"]
    assert rows(report, "peft_peer", "PEFT")[0]["adapters"] == 4
