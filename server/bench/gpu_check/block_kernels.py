"""Section ``block_kernels``: compares the Triton kernels of a block with torch.

They are the norms, the rotary embedding with the KV store, and the gated activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from server.bench.gpu_check.context import Context
from server.bench.gpu_check.rows import Row, Skip, Value
from server.bench.gpu_check.timing import seconds_of
from server.engine.kernels import BlockOps, reference

_EXACT = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
_BLOCKS, _BLOCK_SIZE = 12, 16
_EPS = 1e-5


class _Sizes(NamedTuple):
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int


_LARGE, _SMALL = _Sizes(4096, 14336, 32, 8, 128), _Sizes(576, 96, 3, 1, 40)

_IN_A_ROW = 32
"""The number of calls in a graph. Launching a graph takes longer than a single call."""

Result = Callable[[BlockOps, bool], tuple[Tensor, ...]]
"""Takes the operations and ``fresh``: whether it copies the tensors that it changes in place.

Timing changes its own tensors repeatedly, so their values may overflow.
"""


def run(context: Context) -> Iterator[Row]:
    """For each operation, dtype and number of rows: whether both agree. On a GPU also both times."""
    if find_spec("triton") is None:
        raise Skip("Triton is not installed")
    from server.engine.kernels import triton

    sizes, counts = (_LARGE, (1, 64)) if context.gpu else (_SMALL, (3,))
    for dtype in _EXACT:
        for tokens in counts:
            for name, result in _operations(context, sizes, tokens, dtype).items():
                context.check_time()
                values: dict[str, Value] = {"operation": name, "dtype": str(dtype)[6:], "tokens": tokens}
                failed = _difference(result(triton, True), result(reference, True), _EXACT[dtype])
                if context.gpu is not None:
                    for column, ops in (("us", triton), ("torch us", reference)):
                        took = seconds_of([partial(result, ops, False)] * _IN_A_ROW)
                        values[column] = round(took * 1e6, 1)
                yield Row("equal to the reference", values, failed)


def _difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: float) -> str:
    try:
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=exact, atol=exact)
    except AssertionError as error:
        return " ".join(str(error).split())[:300]
    return ""


def _operations(context: Context, sizes: _Sizes, tokens: int, dtype: torch.dtype) -> dict[str, Result]:
    """Each operation by name. Its results and the tensors it changes are the same at every call."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(context.device, kind)

    x, delta, gate_up = (
        random(tokens, sizes.hidden),
        random(tokens, sizes.hidden),
        random(tokens, 2 * sizes.inner),
    )
    timed_x = x.clone()
    weight, other = (random(sizes.hidden, kind=torch.float32) for _ in range(2))
    turn = _Turn(context, sizes, tokens, dtype, random)

    def fused_add_rms_norm(
        ops: BlockOps, fresh: bool, delta_weight: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        own = x.clone() if fresh else timed_x
        return ops.fused_add_rms_norm(own, delta, weight, _EPS, delta_weight), own

    return {
        "norm": lambda ops, _: (ops.fused_add_rms_norm(x, None, weight, _EPS),),
        "add, norm": fused_add_rms_norm,
        "norm, add, norm": lambda ops, fresh: fused_add_rms_norm(ops, fresh, other),
        "rotary, KV store": turn,
        "norms, rotary, KV store": lambda ops, fresh: turn(ops, fresh, normed=True),
        "SiLU gate": lambda ops, _: (ops.act_and_mul(gate_up, gelu=False),),
        "GELU gate": lambda ops, _: (ops.act_and_mul(gate_up, gelu=True),),
    }


class _Turn:
    """The rotary embedding of q and k, and the store of k and v into pages."""

    def __init__(
        self, context: Context, sizes: _Sizes, tokens: int, dtype: torch.dtype, random: Callable[..., Tensor]
    ) -> None:
        heads = sizes.heads + 2 * sizes.kv_heads
        self._qkv = random(tokens, heads * sizes.dim)
        self._angles = [random(tokens + 5, sizes.dim, kind=torch.float32) for _ in range(2)]
        self._norms = [random(sizes.dim, kind=torch.float32) for _ in range(2)]
        self._positions = torch.arange(5, tokens + 5, device=context.device)
        slots = torch.randperm(_BLOCKS * _BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
        self._slots = slots[:tokens].to(context.device)
        shape = _BLOCKS, _BLOCK_SIZE, sizes.kv_heads, sizes.dim
        self._keys, self._values = torch.zeros(2, *shape, dtype=dtype, device=context.device)
        self._timed = self._qkv.clone(), self._keys.clone(), self._values.clone()

    def __call__(self, ops: BlockOps, fresh: bool, normed: bool = False) -> tuple[Tensor, ...]:
        given = self._qkv, self._keys, self._values
        qkv, keys, values = (tensor.clone() for tensor in given) if fresh else self._timed
        cos, sin = self._angles
        q_norm, k_norm = self._norms if normed else (None, None)
        step = qkv, cos, sin, self._positions, self._slots
        q = ops.rope_and_cache(*step, keys, values, q_norm, k_norm, _EPS)
        return q, keys, values
