"""The floor of a step, compared with numbers computed by hand."""

from __future__ import annotations

import pytest

from server.bench.roofline import WEIGHT_BYTES, Machine, Step, Work, floor, launches, llama_stack, works
from server.bench.shapes import SHAPES
from server.cli import main


def test_a_floor_is_the_longer_of_reading_and_computing() -> None:
    machine = Machine(bandwidth=100.0, rate=1000.0)
    assert Work(nbytes=200, operations=1000).floor(machine) == 2
    assert Work(nbytes=200, operations=5000).floor(machine) == 5


def test_the_8b_shape_has_its_published_sizes() -> None:
    stack = llama_stack(SHAPES["llama-8b"])
    assert stack.weights == 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert stack.weights + 2 * stack.head == pytest.approx(8.03e9, rel=1e-3)
    assert 2 * stack.kv_width == 128 * 1024, "the bytes of one token's keys and values"


def test_double_quantised_nf4_takes_4_127_bits() -> None:
    assert 8 * WEIGHT_BYTES["nf4, scales in 8 bits"] == pytest.approx(4.127, abs=1e-3)


def test_a_step_reads_weights_once_and_keys_once_a_sequence() -> None:
    stack = llama_stack(SHAPES["llama-8b"])
    one, many = (works(stack, Step(n, 100), 2.0) for n in (1, 64))
    assert many["linears"].nbytes == one["linears"].nbytes == 2 * stack.weights
    assert many["linears"].operations == 64 * one["linears"].operations
    assert many["attention"].nbytes == 64 * one["attention"].nbytes == 64 * 100 * 128 * 1024


def test_a_head_in_4_bits_is_read_in_a_quarter_and_computed_like_any() -> None:
    stack, nf4 = llama_stack(SHAPES["llama-8b"]), WEIGHT_BYTES["nf4, scales in bf16"]
    wide, narrow = (works(stack, Step(1, 100), nf4, *head)["head"] for head in ((), (nf4,)))
    assert wide.nbytes == 2 * 4096 * 128256
    assert narrow.nbytes == wide.nbytes * (0.25 + 1 / 64)
    assert narrow.operations == wide.operations


def test_an_adapter_is_read_once_and_computed_with_by_each_sequence() -> None:
    stack = llama_stack(SHAPES["llama-8b"])
    lora = works(stack, Step(64, 100, read_ranks=16, used_ranks=64 * 16), 2.0)["lora"]
    assert lora.nbytes == 2 * 16 * stack.row_width
    assert lora.operations == 2 * 64 * 16 * stack.row_width


def test_the_model_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "roofline", "--device", "a100", "--shape", "llama-1b", "--adapters", "0"]) == 0
    out = capsys.readouterr().out
    assert "not a measurement" in out
    stack = llama_stack(SHAPES["llama-1b"])
    parts = works(stack, Step(64, 256), WEIGHT_BYTES["nf4, scales in float32"])
    assert f"{floor(parts, Machine(2.039e12, 312e12)) * 1e3:.3f}" in out
    assert f"with {launches(stack, False)} launches" in out
