"""The check of a base at the start. Correct bases pass once. Faults are refused with their cause."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import server.engine.model.transformers_model as transformers_model
from adapters.base import LoadedBase, load_base, prepare_base
from adapters.base.experts import Nf4Experts
from adapters.errors import BaseModelError
from adapters.kernels.segmented import segmented_lora
from server.engine.build import assemble
from server.engine.check import StartCheck
from server.engine.check.causes import cause_of
from server.engine.check.sample import Request, Step, chunks_of, mixed_steps, requests_for
from tests.support.running_engine import build, config_for
from tests.support.tiny_models import make_tiny_model

FLAGS = ["--quantization", "none"]
SPARSE = ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"]


def _verdicts(home: Path) -> list[Path]:
    return list((home / "bases").glob("*.checked.json"))


def _start(base: Path, home: Path) -> None:
    build(base, home, *FLAGS).close()


# -- correct bases--------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", *SPARSE])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_correct_base_passes_and_the_verdict_has_the_deviation(
    family: str, quantization: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    parts = build(make_tiny_model(family, tmp_path / "model"), tmp_path, "--quantization", quantization)
    assert "checked against transformers" in caplog.text
    (row,) = json.loads(_verdicts(tmp_path)[0].read_text())
    assert row["model"] == parts.model.name
    assert 0 < row["deviation"] < 0.1
    assert parts.residency.pool.rows_used == 0
    parts.close()


def test_the_check_runs_once_for_each_set_of_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_model("llama", tmp_path / "model")
    runs: list[int] = []
    original = StartCheck._expect

    def expect(*args: Any) -> None:
        runs.append(1)
        original(*args)

    monkeypatch.setattr(StartCheck, "_expect", expect)
    _start(base, tmp_path)
    _start(base, tmp_path)
    assert len(runs) == 1
    build(base, tmp_path, *FLAGS, "--block-size", "32").close()
    assert len(runs) == 2
    monkeypatch.setattr("server.engine.check.facts.VERSION", "another")
    _start(base, tmp_path)
    assert len(runs) == 3
    monkeypatch.setattr("server.engine.check.facts.code_digest", lambda: "other code")
    _start(base, tmp_path)
    assert len(runs) == 4


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1]", '[{"facts": 3}]', '[{"facts": {}, "model": "x", "deviation": "y"}]']
)
def test_a_damaged_verdict_is_ignored(content: str, tmp_path: Path) -> None:
    base = make_tiny_model("llama", tmp_path / "model")
    _start(base, tmp_path)
    (path,) = _verdicts(tmp_path)
    right = path.read_text()
    path.write_text(content)
    _start(base, tmp_path)
    assert json.loads(path.read_text()) == json.loads(right)


def test_a_verdict_of_another_model_does_not_count(tmp_path: Path) -> None:
    base = make_tiny_model("llama", tmp_path / "model")
    _start(base, tmp_path)
    (path,) = _verdicts(tmp_path)
    path.write_text(path.read_text().replace('"transformers",\n  "dev', '"another",\n  "dev'))
    _start(base, tmp_path)
    assert [row["model"] for row in json.loads(path.read_text())] == ["another", "transformers"]


def test_a_verdict_that_cannot_be_written_does_not_end_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_tiny_model("llama", tmp_path / "model")
    _start(base, tmp_path)
    (path,) = _verdicts(tmp_path)
    path.unlink()
    path.mkdir()
    _start(base, tmp_path)
    assert "cannot be kept" in caplog.text
    assert [one for one in path.parent.iterdir() if one.suffix != ".lock"] == [path]


# -- faults ---------------------------------------------------------------------------------------


def _llama(home: Path, hook: Callable[..., Tensor]) -> LoadedBase:
    """A base with ``hook`` on its first MLP's input and output. transformers runs the hook too."""
    base = load_base(
        prepare_base(str(make_tiny_model("llama", home / "model")), home, "none", progress=False)
    )
    base.model.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: hook(inputs[0], output))
    return base


def _convolution(x: Tensor, y: Tensor) -> Tensor:
    """Add the previous token of the step, as layers with recurrent state do."""
    y[:, 1:] += x[:, :-1]
    return y


def _decoding_fails(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[1] == 2:
        raise IndexError("no such expert")
    return y


def test_a_state_besides_keys_and_values_is_refused_with_its_cause(tmp_path: Path) -> None:
    base = _llama(tmp_path, _convolution)
    with pytest.raises(
        BaseModelError, match=r"LlamaForCausalLM \(llama\) cannot be served: .*differ.*in chunks"
    ):
        assemble(config_for(tmp_path / "model", tmp_path, *FLAGS), base)
    assert not _verdicts(tmp_path)


def test_wrong_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Nf4Experts.product

    def shifted(self: Nf4Experts, name: str, x: Tensor, counts: list[int]) -> Tensor:
        return right(self, name, x, counts[1:] + counts[:1])

    monkeypatch.setattr(Nf4Experts, "product", shifted)
    with pytest.raises(BaseModelError, match=r"\(mixtral\) cannot be served: .*differ"):
        build(make_tiny_model("mixtral", tmp_path / "model"), tmp_path)


def test_an_exception_in_the_check_names_the_architecture(tmp_path: Path) -> None:
    base = _llama(tmp_path, _decoding_fails)
    with pytest.raises(BaseModelError, match=r"\(llama\) cannot be served: the check .*IndexError \(no such"):
        assemble(config_for(tmp_path / "model", tmp_path, *FLAGS), base)


def test_a_wrong_mask_is_refused_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine.attention.metadata import PrefillPart

    monkeypatch.setattr(
        PrefillPart, "seen", lambda self, _: torch.ones(self.stop - self.start, len(self.kv_slots)).bool()
    )
    monkeypatch.setattr(PrefillPart, "whole", False)
    monkeypatch.setattr("adapters.kernels.cpu.library", lambda: None)
    with pytest.raises(BaseModelError, match="wrong even alone"):
        _start(make_tiny_model("llama", tmp_path / "model"), tmp_path)


class Silent:
    """A LoRA kernel that adds nothing."""

    def __call__(self, *_: object) -> None:
        pass


class Spilling:
    """A LoRA kernel that adds to all rows of a step."""

    def __call__(self, y: Tensor, x: Tensor, pool: Any, segments: Sequence[Any]) -> None:
        everything = [segments[0]._replace(start=0, stop=len(y))]
        segmented_lora(y, x, pool, everything)


@pytest.mark.parametrize(
    ("kernel", "cause"), [(Silent, "not with an adapter"), (Spilling, "not beside a request")]
)
def test_a_wrong_lora_kernel_is_refused_with_its_cause(
    kernel: type[Any], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_model, "choose_lora", lambda *_: kernel())
    with pytest.raises(BaseModelError, match=cause):
        _start(make_tiny_model("llama", tmp_path / "model"), tmp_path)


# -- parts ----------------------------------------------------------------------------------------

PROMPTS = [tuple(range(27)), tuple(range(100, 161))]


@pytest.mark.parametrize(
    ("right", "cause"), [((), "alone"), (("whole",), "in chunks"), (("whole", "chunked"), "beside another")]
)
def test_the_cause_names_the_simplest_steps_that_are_wrong(right: tuple[str, ...], cause: str) -> None:
    def is_right(steps: Sequence[Step]) -> bool:
        return ("whole" if len(steps) == 2 else "chunked") in right

    assert cause in cause_of(is_right, requests_for(PROMPTS, 10, 16), 128)


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 128])
@pytest.mark.parametrize(("num_blocks", "block_size"), [(2, 4), (64, 16)])
def test_every_token_is_computed_once_in_order_and_steps_keep_their_bounds(
    max_tokens: int, num_blocks: int, block_size: int
) -> None:
    requests = requests_for(PROMPTS, num_blocks, block_size)
    steps = mixed_steps(requests, max_tokens)
    done = [0, 0]
    for step in steps:
        assert sum(part.stop - part.start for part in step) <= max_tokens
        for part in step:
            assert part.start == done[part.request]
            done[part.request] = part.stop
        for chunk, part in zip(chunks_of(step, requests), step, strict=True):
            assert chunk.samples
            assert chunk.length == part.stop - part.start
    assert done == [len(request.tokens) for request in requests]
    blocks = [block for request in requests for block in request.blocks]
    assert len(set(blocks)) == len(blocks)
    assert max(blocks) < num_blocks


def test_mixed_steps_put_chunks_beside_chunks_and_beside_decoding() -> None:
    steps = mixed_steps([Request(PROMPTS[0], (0,)), Request(PROMPTS[1], (1,))], 128)
    lengths = [sorted(part.stop - part.start for part in step) for step in steps]
    assert any(low == 1 and high > 1 for low, high in lengths[:-1]), (
        "a step must decode one request beside the other's prompt"
    )
    assert all(low > 1 for low, _ in lengths[:2]), "the first steps must have both prompts"
    assert lengths[-1][0] == 1
