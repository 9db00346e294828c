"""The 4-bit product: any number of rows, several linears at once, with the same bits as bitsandbytes."""

from __future__ import annotations

from ctypes import addressof, byref, c_void_p

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.kernels.cpu import library
from adapters.kernels.cpu.structs import LinearCall
from tests.support.native_kernels import ISAS, using
from tests.support.nf4_linear import Nf4Linear, codebook


def run(linears: list[Nf4Linear], x: Tensor) -> list[Tensor]:
    """Computes all linears in one call. They write side by side into the rows of one buffer."""
    loaded, values = library(), codebook()
    assert loaded is not None
    y = torch.full((x.shape[0], sum(linear.outputs for linear in linears)), 99.0, dtype=torch.bfloat16)
    outs = torch.split(y, [linear.outputs for linear in linears], dim=1)
    structs = [linear.struct() for linear in linears]
    pointers = (c_void_p * len(linears))(*map(addressof, structs))
    targets = (c_void_p * len(linears))(*(out.data_ptr() for out in outs))
    call = LinearCall(
        addressof(pointers), addressof(targets), len(linears), y.shape[1],
        x.data_ptr(), x.stride(0), x.shape[0], values.data_ptr(),
    )  # fmt: skip
    loaded.manylora_linears(byref(call))
    return list(outs)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.sampled_from([64, 128, 192]),
    st.lists(st.tuples(st.sampled_from([32, 64, 96]), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 7),
    st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", ISAS)
def test_it_equals_the_reference_and_each_row_alone(
    name: str, rows: int, inputs: int, shapes: list[tuple[int, bool]], padding: int, seed: int
) -> None:
    linears = [Nf4Linear(inputs, outputs, seed + i, bias) for i, (outputs, bias) in enumerate(shapes)]
    wide = torch.randn(rows, inputs + padding, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x = wide[:, :inputs]
    with using(name):
        together = run(linears, x)
        alone = [run(linears, x[row : row + 1]) for row in range(rows)]
    for i, linear in enumerate(linears):
        torch.testing.assert_close(together[i].float(), linear.expected(x), rtol=0.01, atol=0.02)
        for row in range(rows):
            assert torch.equal(together[i][row], alone[row][i][0])


@pytest.mark.parametrize("rows", [1, 3, 6, 7, 16, 65])
def test_it_equals_bitsandbytes_to_the_bit(rows: int) -> None:
    linear = Nf4Linear(576, 192, seed=rows, bias=False)
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(rows)).bfloat16()
    with using("avx512bf16"):  # bitsandbytes packs weights only for this instruction set
        (ours,) = run([linear], x)
    theirs = torch.ops.bitsandbytes.gemv_4bit(
        x, linear.packed, [192, 576], linear.absmax, bnb.get_4bit_type("nf4", device="cpu"), 64
    )
    assert torch.equal(ours, theirs)
