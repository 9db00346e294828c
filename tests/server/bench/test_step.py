"""``manylora bench step`` on a tiny model: every part is measured, and the parts add up to the step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters.kernels.cpu import isa
from server.bench.step import PARTS
from server.cli import main
from tests.support.tiny_models import make_tiny_model


@pytest.mark.skipif(isa() != "avx512bf16", reason="the fused step does not run on this machine")
@pytest.mark.parametrize("head", ["none", "nf4"])
def test_the_parts_make_up_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str) -> None:
    base = make_tiny_model("llama", tmp_path / "llama", vocab_size=2048)
    sizes = ["--num-adapters", "2", "--adapter-rank", "4", "--context", "100", "--steps", "4"]
    where = ["--base", str(base), "--home", str(tmp_path), "--head-quantization", head]
    assert main(["bench", "step", *where, "--num-seqs", "2", *sizes]) == 0
    with_adapters, without = capsys.readouterr().out.split("\n\n")[1:]
    assert "2 sequences on 2 adapters" in with_adapters
    took = dict(re.findall(r"^(\w+) +([\d.]+)", with_adapters, flags=re.MULTILINE))
    assert sum(float(took[part]) for part in PARTS) == pytest.approx(float(took["step"]), abs=0.01)
    assert float(took["lora"]) > 0
    assert re.search(r"^lora +0\.000", without, flags=re.MULTILINE)
