"""``manylora train`` and its ``--check`` refuse a base that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.base import load_base, prepare_base
from adapters.training import run
from server import cli
from server.engine.check import alone, check_alone
from tests.support.running_engine import build
from tests.support.tiny_models import PHI3, make_tiny_model

ROWS = [{"prompt": f"say {i}", "completion": f"word {i}"} for i in range(8)]
UNSERVABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "by its config": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
    "with Mamba-2 layers": (
        "bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        "layers of the kind",
    ),
    "with Mamba layers": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 16},
        "layers of the kind",
    ),
    "by the check": ("roberta", {"is_decoder": True}, "differ from transformers' own by"),
}


def _words(folder: Path, base: Path) -> list[str]:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"--data": data, "--base": base, "--home": folder / "home", "--name": "acme", "--threads": 1}
    options |= {"--quantization": "none", "--r": 2, "--max-steps": 1, "--run-dir": folder / "run"}
    return ["train", *(str(word) for pair in options.items() for word in pair)]


@pytest.mark.parametrize("case", UNSERVABLE)
def test_a_base_that_cannot_be_served_is_not_trained(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, fields, reason = UNSERVABLE[case]
    words = _words(tmp_path, make_tiny_model(family, tmp_path / "model", **fields))
    assert cli.main(words) == 1
    assert f"({family}) cannot be served: " in (error := capsys.readouterr().err)
    assert reason in error
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error_type"] == "BaseModelError"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_check_refuses_such_a_config_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, fields, reason = UNSERVABLE["by its config"]
    words = _words(tmp_path, make_tiny_model(family, tmp_path / "model", **fields))
    assert cli.main([*words, "--check"]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_is_checked_once_by_training_or_by_serving(
    quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, home = str(make_tiny_model("llama", tmp_path / "model")), tmp_path / "home"
    prepared = prepare_base(base, home, quantization, progress=False)
    loads: list[str] = []

    def load(*args: Any) -> Any:
        loads.append(args[1])
        return load_base(*args)

    monkeypatch.setattr(alone, "load_base", load)
    check_alone(prepared, home, "cpu", None)
    check_alone(prepared, home, "cpu", None)
    assert loads == ["cpu"]
    for path in (home / "bases").glob("*.checked.json"):
        path.unlink()
    build(base, home, "--quantization", quantization).close()
    check_alone(prepared, home, "cpu", None)
    assert loads == ["cpu"]


@pytest.mark.parametrize(("flags", "position"), [([], 511), (["--max-model-len", "32"], 31)])
def test_longrope_is_trained_as_it_is_served(
    flags: list[str], position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        bases.append(load_base(*args, **options))
        return bases[-1]

    monkeypatch.setattr(run, "load_base", load)
    folder = make_tiny_model("phi3", tmp_path / "model", **PHI3)
    assert cli.main([*_words(tmp_path, folder), *flags]) == 0
    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[position]]))
    (base,) = bases
    assert torch.equal(base.model.model.rotary_emb.inv_freq, rotary.inv_freq)
