"""Compares the Triton product of NF4 weights with bitsandbytes, on a GPU or else with Triton's interpreter.

pytest does not collect this file: ``test_interpreted.py`` runs it.
"""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.kernels import nf4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The interpreter truncates weights to bf16; GPUs round them."""


def rand(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(
    rows: int, outputs: int, blocks: int, dtype: torch.dtype, with_bias: bool, blocksize: int = 64
) -> None:
    inputs = blocks * blocksize
    x = rand(rows, inputs, dtype=dtype, seed=0)
    dense = rand(outputs, inputs, dtype=dtype, seed=1) * inputs**-0.5
    bias = rand(outputs, dtype=dtype, seed=2) if with_bias else None
    packed, state = quantize_4bit(dense, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
    expected = x.float() @ dequantize_4bit(packed, state).float().T
    if bias is not None:
        expected += bias.float()
    got = nf4.product(x, packed, state.absmax, state.code, outputs, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=EXACT[dtype], atol=EXACT[dtype])


dtypes = st.sampled_from(list(EXACT))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, nf4.MOST_ROWS), st.integers(1, 400), st.integers(1, 5), dtypes, st.booleans(),
    st.sampled_from([64, 128]),
)  # fmt: skip
@example(1, 1, 1, torch.bfloat16, True, 64)
@example(17, 257, 9, torch.float16, True, 64)
@example(64, 256, 4, torch.bfloat16, False, 64)
@example(nf4.MOST_ROWS, 129, 2, torch.float16, True, 128)
def test_it_equals_dequantising(
    rows: int, outputs: int, blocks: int, dtype: torch.dtype, with_bias: bool, blocksize: int
) -> None:
    check(rows, outputs, blocks, dtype, with_bias, blocksize)


@pytest.mark.parametrize("rows", [1, 5, 33, 65])
@pytest.mark.parametrize(("blocks", "outputs"), [(16, 48), (25, 130), (66, 200)])
def test_the_parts_of_k_are_added_up(
    rows: int, blocks: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 tiles are cut into parts of 5, 5 and 3. For 33 tiles in parts of 5, 7 of the 8 parts are enough."""
    monkeypatch.setattr(nf4, "_multiprocessors", lambda _: 132)
    tiles = -(-blocks // 2)
    assert nf4.split(tiles, nf4.FORMS[0].warps, 132 * 8)[0] == {8: 2, 13: 3, 33: 7}[tiles]
    for with_bias in (True, False):
        check(rows, outputs, blocks, torch.float16, with_bias)


def test_columns_of_something_wider_are_copied_first() -> None:
    wide = rand(3, 128, dtype=torch.float16, seed=0)
    packed, state = quantize_4bit(rand(20, 64, dtype=torch.float16, seed=1), quant_type="nf4", blocksize=64)
    got = nf4.product(wide[:, 64:], packed, state.absmax, state.code, 20)
    assert torch.equal(got, nf4.product(wide[:, 64:].clone(), packed, state.absmax, state.code, 20))
