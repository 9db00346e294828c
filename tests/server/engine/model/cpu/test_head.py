"""The native final norm and output head, in bf16 and in NF4."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.model.cpu.weights import pack_head
from tests.support.native_kernels import ISAS, head, threads, using
from tests.support.nf4_linear import Nf4Linear, codebook

Shape = tuple[int, int, int, list[int], float]
shapes = st.tuples(
    st.integers(1, 80),
    st.integers(1, 60).map(lambda half: 2 * half),
    st.integers(1, 40),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=40),
    st.sampled_from([0.0, 3.0]),
)


@dataclass
class Head:
    """A random head, as a dense tensor and in the kernel's form.

    Attributes:
        dense: [vocabulary, hidden].
        fields: the fields of ``HeadCall``. They point into ``kept``.
    """

    dense: Tensor
    fields: dict[str, int]
    kept: tuple[object, ...]


def in_bf16(vocabulary: int, hidden: int) -> Head:
    weight = torch.randn(vocabulary, hidden).bfloat16()
    packed = pack_head(weight)
    return Head(weight, {"w": packed.data_ptr()}, (packed,))


def in_nf4(vocabulary: int, hidden: int) -> Head:
    """A head in NF4. Its sizes are rounded up to whole panels and quantisation blocks."""
    linear = Nf4Linear(-(-hidden // 64) * 64, -(-vocabulary // 32) * 32, seed=vocabulary, bias=False)
    struct, values = linear.struct(), codebook()
    fields = {"nf4": addressof(struct), "codebook": values.data_ptr()}
    return Head(linear.dense(), fields, (linear, struct, values))


HEADS = pytest.mark.parametrize("make_head", [in_bf16, in_nf4])
MakeHead = Callable[[int, int], Head]


def _make(shape: Shape, make_head: MakeHead) -> tuple[Tensor, list[int], Tensor, Head]:
    """x, the rows of x to use, the norm's weights, and the head."""
    vocabulary, hidden, tokens, rows, _ = shape
    torch.manual_seed(vocabulary * hidden)
    made = make_head(vocabulary, hidden)
    hidden = made.dense.shape[1]
    return torch.randn(tokens, hidden).bfloat16(), [row % tokens for row in rows], torch.randn(hidden), made


@settings(deadline=None, max_examples=40)
@given(shapes)
@pytest.mark.parametrize("isa", ISAS)
@HEADS
def test_the_head_equals_norm_and_product(make_head: MakeHead, isa: str, shape: Shape) -> None:
    x, rows, norm, made = _make(shape, make_head)
    cap = shape[4]
    with using(isa) as loaded:
        got = head(loaded, x, rows, norm, made.fields, len(made.dense), cap)
    normed = torch.nn.functional.rms_norm(x[rows].float(), x.shape[1:], norm, eps=1e-5).bfloat16()
    expected = normed.float() @ made.dense.float().T
    expected = cap * torch.tanh(expected / cap) if cap else expected
    # If the two norms round a number to different bf16 neighbours, a sum changes by 2^-8 of one term.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.05)


@settings(deadline=None, max_examples=25)
@given(shapes)
@pytest.mark.parametrize("isa", ISAS)
@HEADS
def test_a_row_is_the_same_to_the_bit_alone_and_on_two_threads(
    make_head: MakeHead, isa: str, shape: Shape
) -> None:
    x, rows, norm, made = _make(shape, make_head)
    vocabulary = len(made.dense)
    with using(isa) as loaded:
        with threads(2):
            together = head(loaded, x, rows, norm, made.fields, vocabulary, shape[4])
        with threads(1):
            alone = [head(loaded, x, [row], norm, made.fields, vocabulary, shape[4]) for row in rows]
    assert torch.equal(together, torch.cat(alone))
