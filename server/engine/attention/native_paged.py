"""Paged attention by the native kernel (``adapters/kernels/cpu/src/attention.h``), for bf16 on a CPU.

It reads the pages in place. A token's result is bit-identical however its prompt was chunked and whatever
else is in the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import addressof, byref

import torch
from torch import Tensor

from adapters.kernels.cpu.structs import AttentionCall, Pages
from server.engine.attention import AttentionSpec, KvShape
from server.engine.attention.native_tokens import TILE, NativeTokens
from server.engine.sequence import Chunk


class NativePages:
    """All layers' keys and values in tiles of 16 tokens, each [tiles, kv_heads, 16 * head_dim]."""

    def __init__(self, shapes: Mapping[int, KvShape], num_slots: int) -> None:
        self._memory: list[Tensor] = []
        self.layers = {layer: self._layer(shape, num_slots) for layer, shape in shapes.items()}

    def check(self, layer: int, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
        """Raises ValueError if the kernel would read or write outside this layer's pages."""
        pages = self.layers[layer]
        kv = (tokens, pages.kv_heads, pages.head_dim)
        heads = q.shape[1]
        if k.shape == v.shape == kv and q.shape == (tokens, heads, kv[2]) and heads % kv[1] == 0:
            return
        raise ValueError(
            f"layer {layer} attends with q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} in a "
            f"step of {tokens} tokens; its pages have {kv[1]} heads of {kv[2]}"
        )

    def _layer(self, shape: KvShape, num_slots: int) -> ctypes.Structure:
        size = num_slots * shape.kv_heads * shape.key_dim
        # Not zeroed: pages are written before they are read, and take no memory until then.
        keys, values = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
        self._memory += [keys, values]
        return Pages(keys.data_ptr(), values.data_ptr(), shape.kv_heads, shape.key_dim)


class NativePaged:
    """See ``AttentionBackend``."""

    name = "native"
    graphable = False

    def __init__(self, library: ctypes.CDLL, block_size: int) -> None:
        self._run = library.manylora_attention
        self._block_size = block_size
        self._pages: NativePages | None = None
        self._tokens = NativeTokens(block_size)

    @staticmethod
    def fits(shapes: Mapping[int, KvShape], block_size: int) -> bool:
        """Whether the kernel supports these layers: blocks of whole tiles, heads of whole registers."""
        even = all(
            shape.key_dim == shape.value_dim and shape.key_dim % TILE == 0 for shape in shapes.values()
        )
        return even and block_size % TILE == 0

    def allocate(self, shapes: Mapping[int, KvShape], num_blocks: int) -> None:
        self._pages = NativePages(shapes, num_blocks * self._block_size)

    def begin(self, chunks: Sequence[Chunk], graph_batch_size: int | None = None) -> None:
        assert graph_batch_size is None, "a CPU has no CUDA graphs"
        self._tokens.begin(chunks)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        assert self._pages is not None
        self._pages.check(layer, q, k, v, self._tokens.struct.count)
        q, k, v = (x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        call = AttentionCall(
            pages=addressof(self._pages.layers[layer]),
            tokens=addressof(self._tokens.struct),
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            out=out.data_ptr(),
            heads=q.shape[1],
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            window=spec.window or 0,
        )
        self._run(byref(call))
        return out
