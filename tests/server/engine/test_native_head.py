"""The native final norm and output head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.model.fused_weights import pack_head
from tests.adapters.native_calls import ISAS, head, threads, using

Shape = tuple[int, int, int, list[int], float]
shapes = st.tuples(
    st.integers(1, 80),
    st.integers(1, 60).map(lambda half: 2 * half),
    st.integers(1, 40),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=40),
    st.sampled_from([0.0, 3.0]),
)


def _make(shape: Shape) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """x, which rows of it, the norm's weights, the head's."""
    vocabulary, hidden, tokens, rows, _ = shape
    torch.manual_seed(vocabulary * hidden)
    weight = torch.randn(vocabulary, hidden).bfloat16()
    return torch.randn(tokens, hidden).bfloat16(), [row % tokens for row in rows], torch.randn(hidden), weight


@settings(deadline=None, max_examples=40)
@given(shapes)
@pytest.mark.parametrize("isa", ISAS)
def test_the_head_equals_norm_and_product(isa: str, shape: Shape) -> None:
    x, rows, norm, weight = _make(shape)
    cap = shape[4]
    with using(isa) as loaded:
        got = head(loaded, x, rows, norm, pack_head(weight), len(weight), cap)
    normed = torch.nn.functional.rms_norm(x[rows].float(), x.shape[1:], norm, eps=1e-5).bfloat16()
    expected = normed.float() @ weight.float().T
    expected = cap * torch.tanh(expected / cap) if cap else expected
    # A number that the two norms round to different bf16 neighbours moves a sum by 2^-8 of one term.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.05)


@settings(deadline=None, max_examples=25)
@given(shapes)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_the_same_to_the_bit_alone_and_on_two_threads(isa: str, shape: Shape) -> None:
    x, rows, norm, weight = _make(shape)
    packed = pack_head(weight)
    with using(isa) as loaded:
        with threads(2):
            together = head(loaded, x, rows, norm, packed, len(weight), shape[4])
        with threads(1):
            alone = [head(loaded, x, [row], norm, packed, len(weight), shape[4]) for row in rows]
    assert torch.equal(together, torch.cat(alone))
