"""A block's small operations: the reference equals transformers, and Triton compiles the kernels well.

``block_kernel_cases.py`` tests the results of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from server.engine import kernels
from server.engine.kernels import choose, reference
from tests.support.triton_running import check_wide, compile_for

EXACT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""The tolerance. transformers also rounds between the operations."""

dtypes = st.sampled_from(list(EXACT))


def check(got: Tensor, expected: Tensor) -> None:
    exact = EXACT[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=exact, atol=exact)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 600), dtypes)
@torch.inference_mode()
def test_the_references_norm_equals_llamas(n: int, hidden: int, dtype: torch.dtype) -> None:
    theirs = LlamaRMSNorm(hidden, eps=1e-5).to(dtype)
    theirs.weight.copy_(torch.randn(hidden))
    x, delta = torch.randn(2, n, hidden).to(dtype)
    total = x + delta
    check(reference.fused_add_rms_norm(x, None, theirs.weight.float(), 1e-5), theirs(x))
    check(reference.fused_add_rms_norm(x, delta, theirs.weight.float(), 1e-5), theirs(total))
    assert torch.equal(x, total)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 600), dtypes)
@torch.inference_mode()
def test_the_references_norms_around_the_addition_equal_gemma2s(
    n: int, hidden: int, dtype: torch.dtype
) -> None:
    after, before = (Gemma2RMSNorm(hidden, eps=1e-6).to(dtype) for _ in range(2))
    for norm in (after, before):
        norm.weight.copy_(0.3 * torch.randn(hidden))
    x, delta = torch.randn(2, n, hidden).to(dtype)
    total = x + after(delta)
    got = reference.fused_add_rms_norm(x, delta, 1 + before.weight.float(), 1e-6, 1 + after.weight.float())
    check(got, before(total))
    check(x, total)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 40).map(lambda half: 2 * half),
    dtypes,
    st.booleans(),
    st.integers(1, 40),
)
@torch.inference_mode()
def test_the_reference_turns_heads_as_qwen3_and_phi3_do(
    n: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool, turned: int
) -> None:
    norms = [Qwen3RMSNorm(dim, eps=1e-6).to(dtype) for _ in range(2)] if normed else []
    for norm in norms:
        norm.weight.copy_(torch.rand(dim))
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim).to(dtype)
    q, k, v = torch.split(qkv.clone().view(1, n, -1, dim), [heads, kv_heads, kv_heads], dim=2)
    if normed:
        q, k = (norm(part) for norm, part in zip(norms, (q, k), strict=True))
    angles = 10 * torch.rand(20, min(2 * turned, dim))
    positions, slots = torch.randint(20, (n,)), torch.randperm(8)[:n]
    cos, sin = angles.cos(), angles.sin()
    q, k = apply_rotary_pos_emb(q.float(), k.float(), cos[positions][None], sin[positions][None], 2)
    pages = torch.zeros(2, 2, 4, kv_heads, dim, dtype=dtype)
    q_norm, k_norm = [norm.weight.float() for norm in norms] if normed else [None, None]
    got = reference.rope_and_cache(
        qkv, cos, sin, positions, slots, pages[0], pages[1], q_norm, k_norm, eps=1e-6
    )
    check(got, q[0].to(dtype))
    check(pages[0].flatten(0, 1)[slots], k[0].to(dtype))
    assert torch.equal(pages[1].flatten(0, 1)[slots], v[0])
    assert not pages.flatten(1, 2)[:, [slot for slot in range(8) if slot not in slots]].any()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 600), dtypes, st.booleans())
def test_the_references_activation_equals_transformers(
    n: int, inner: int, dtype: torch.dtype, gelu: bool
) -> None:
    gate, up = gate_up = 3 * torch.randn(2, n, inner).to(dtype)
    act = ACT2FN["gelu_pytorch_tanh" if gelu else "silu"]
    check(reference.act_and_mul(torch.cat(list(gate_up), dim=1), gelu), act(gate) * up)


def test_triton_is_chosen_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose(gpu) is not reference
    assert choose(cpu) is reference
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    assert choose(gpu) is reference


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
TARGETS = [(80, torch.float16), (90, torch.bfloat16)]


class Launch:
    """Replaces a kernel and keeps the arguments of its launch."""

    arguments: tuple[Any, ...]
    warps: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.keep

    def keep(self, *arguments: Any, num_warps: int) -> None:
        self.arguments, self.warps = arguments, num_warps


def compiled_launch(
    kernel: str, call: Callable[[Any], object], capability: int, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The code that Triton compiles for this call on a GPU."""
    triton = pytest.importorskip("server.engine.kernels.triton")
    function, launch = getattr(triton, kernel), Launch()
    with monkeypatch.context() as patched:
        patched.setattr(triton, kernel, launch)
        call(triton)
    arguments = dict(zip(function.arg_names, launch.arguments, strict=True))
    constants = {name: value for name, value in arguments.items() if value is None or isinstance(value, int)}
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
    types = {
        name: names[value.dtype] if isinstance(value, Tensor) else "fp32"
        for name, value in arguments.items()
        if name not in constants
    }
    return compile_for(
        capability, function, constants, types, {"positions", "new_slots", "eps"}, launch.warps
    )


@pytest.fixture
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("hidden", "normed"), [(576, False), (3584, True), (8192, False)])
def test_compiled_for_a_gpu_a_norm_reads_a_row_once_and_keeps_it_in_registers(
    hidden: int, normed: bool, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.empty(2, hidden, dtype=dtype), torch.empty(hidden)
    delta_weight = weight if normed else None
    compiled = compiled_launch(
        "_fused_add_rms_norm",
        lambda ops: ops.fused_add_rms_norm(x, x, weight, 1e-5, delta_weight),
        capability,
        monkeypatch,
    )
    check_wide(compiled)
    assert compiled.metadata.shared <= 16 * 4, "only one sum of each warp may use shared memory"


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "normed", "rotary"),
    [
        (9, 3, 64, False, 64),
        (32, 32, 96, False, 96),
        (32, 8, 128, True, 128),
        (8, 4, 256, False, 256),
        (24, 8, 128, False, 96),
    ],
)
def test_compiled_for_a_gpu_the_rotary_embedding_uses_no_shared_memory(
    heads: int, kv_heads: int, dim: int, normed: bool, rotary: int, capability: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    qkv, angles = torch.empty(2, (heads + 2 * kv_heads) * dim, dtype=dtype), torch.empty(9, rotary)
    where, pages = torch.empty(2, 2, dtype=torch.int64), torch.empty(2, 3, 16, kv_heads, dim, dtype=dtype)
    norms = [torch.empty(dim)] * 2 if normed else []
    compiled = compiled_launch(
        "_rope_and_cache",
        lambda ops: ops.rope_and_cache(qkv, angles, angles, *where, *pages, *norms),
        capability,
        monkeypatch,
    )
    check_wide(compiled)
    assert compiled.metadata.shared == 0


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("gelu", [False, True])
def test_compiled_for_a_gpu_gates_are_read_in_16_bytes(
    gelu: bool, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up = torch.empty(2, 2 * 14336, dtype=dtype)
    compiled = compiled_launch(
        "_act_and_mul", lambda ops: ops.act_and_mul(gate_up, gelu), capability, monkeypatch
    )
    check_wide(compiled)
