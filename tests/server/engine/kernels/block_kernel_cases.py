"""Compares a block's Triton kernels with their reference, on a GPU or else with Triton's interpreter.

pytest does not collect this file: ``test_interpreted.py`` runs it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.kernels import reference, triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}
"""Tolerances for values of about 1. The interpreter truncates bf16; GPUs round it."""

BLOCK_SIZE = 4
dtypes = st.sampled_from(list(EXACT))
tokens = st.integers(1, 4)
hidden_sizes = st.sampled_from([576, 960, 2304, 4096]) | st.integers(16, 300)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values from -2 to 2. Rounding of larger values would hide errors in small ones."""
    return (4 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 2).to(DEVICE, dtype)


def check(got: Tensor, expected: Tensor) -> None:
    exact = EXACT[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


@settings(deadline=None, max_examples=40)
@given(tokens, hidden_sizes, dtypes, st.sampled_from(["no delta", "delta", "normed delta"]))
def test_fused_add_rms_norm(n: int, hidden: int, dtype: torch.dtype, kind: str) -> None:
    x, delta = rand(n, hidden, dtype=dtype), rand(n, hidden, dtype=dtype, seed=1)
    delta_weight = rand(hidden, seed=2) if kind == "normed delta" else None
    weight = rand(hidden, seed=3)
    ours, theirs = x.clone(), x.clone()
    used = None if kind == "no delta" else delta
    got = triton.fused_add_rms_norm(ours, used, weight, 1e-5, delta_weight)
    check(got, reference.fused_add_rms_norm(theirs, used, weight, 1e-5, delta_weight))
    check(ours, theirs)
    assert torch.equal(delta, rand(n, hidden, dtype=dtype, seed=1)), "delta must not change"


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int
    normed: bool
    rotary: int
    """Dimensions of a head that are rotated."""


dims = st.sampled_from([64, 80, 128, 256]) | st.integers(1, 40).map(lambda half: 2 * half)
rotaries = dims.flatmap(lambda dim: st.tuples(st.just(dim), st.just(dim // 2) | st.integers(1, dim // 2)))


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    dim, half = draw(rotaries)
    return Heads(draw(st.integers(1, 18)), draw(st.integers(1, 4)), dim, draw(st.booleans()), 2 * half)


@settings(deadline=None, max_examples=40)
@given(tokens, heads(), dtypes, st.permutations(range(3 * BLOCK_SIZE)))
@example(2, Heads(32, 8, 128, False, 128), torch.bfloat16, [5, 0])
@example(1, Heads(28, 4, 128, True, 96), torch.float16, [11])
def test_rope_and_cache(n: int, shape: Heads, dtype: torch.dtype, slots: list[int]) -> None:
    qkv = rand(n, (shape.q + 2 * shape.kv) * shape.dim, dtype=dtype)
    cos, sin = (rand(50, shape.rotary, seed=seed) for seed in (1, 2))
    q_norm, k_norm = (rand(shape.dim, seed=seed) if shape.normed else None for seed in (3, 4))
    positions, new_slots = (torch.tensor(values[:n]).to(DEVICE) for values in ([49, 3, 0, 20], slots))
    step = (cos, sin, positions, new_slots)
    pages = torch.full((2, 3, BLOCK_SIZE, shape.kv, shape.dim), 7.0, dtype=dtype, device=DEVICE)
    ours, theirs = (qkv.clone(), pages.clone()), (qkv.clone(), pages.clone())
    got, expected = (
        ops.rope_and_cache(mine, *step, kv[0], kv[1], q_norm, k_norm, 1e-5)
        for ops, (mine, kv) in ((triton, ours), (reference, theirs))
    )
    check(got, expected)
    check(ours[1], theirs[1])
    assert got.shape == (n, shape.q, shape.dim)
    assert got.data_ptr() == ours[0].data_ptr()
    kv_columns = slice(shape.q * shape.dim, None)
    assert torch.equal(ours[0][:, kv_columns], qkv[:, kv_columns]), "k and v must not change"


@settings(deadline=None, max_examples=30)
@given(tokens, st.sampled_from([1024, 1536, 2560]) | st.integers(1, 1100), dtypes, st.booleans())
def test_act_and_mul(n: int, inner: int, dtype: torch.dtype, gelu: bool) -> None:
    gate_up = 3 * rand(n, 2 * inner, dtype=dtype)
    check(triton.act_and_mul(gate_up, gelu), reference.act_and_mul(gate_up, gelu))


@pytest.mark.parametrize("gelu", [False, True])
def test_gates_far_from_zero_pass_all_or_nothing(gelu: bool) -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    check(triton.act_and_mul(gate_up, gelu), torch.tensor([[0.0, 0.0, 90.0, 1e4]], device=DEVICE))
