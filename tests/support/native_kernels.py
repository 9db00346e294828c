"""Calls of the native kernels with torch tensors, and the instruction sets for the tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import addressof, byref, c_int64, c_void_p
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.kernels import Segment
from adapters.kernels.cpu import library
from adapters.kernels.cpu.structs import AttentionCall, HeadCall, LoraCall, Pages, Tokens
from adapters.pool.site_pool import SitePool

ISAS = ["avx512bf16", "avx2", "portable"]
TILE = 16


@contextmanager
def using(isa: str) -> Iterator[ctypes.CDLL]:
    """The library with instruction set ``isa``. Skips if the CPU lacks it. Then restores the best one."""
    loaded = library()
    if loaded is None or not loaded.manylora_choose(isa.encode()):
        pytest.skip(f"no native kernels for {isa} here")
    try:
        yield loaded
    finally:
        next(isa for isa in ISAS if loaded.manylora_choose(isa.encode()))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lora(
    loaded: ctypes.CDLL, ys: list[Tensor], x: Tensor, pools: list[SitePool], segments: list[Segment]
) -> None:
    """Run LoRA on sites that share ``x`` in one call. Updates ``ys`` in place."""
    sites = (c_void_p * len(pools))(*(addressof(pool.native) for pool in pools))
    outs = (c_void_p * len(ys))(*(y.data_ptr() for y in ys))
    strides = (c_int64 * len(ys))(*(y.stride(0) for y in ys))
    packed = np.array(segments, np.int64).reshape(-1, 3)
    call = LoraCall(
        sites=addressof(sites),
        y=addressof(outs),
        y_strides=addressof(strides),
        n_sites=len(pools),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        segments=packed.ctypes.data,
        n_segments=len(segments),
    )
    loaded.manylora_lora(byref(call))


def head(
    loaded: ctypes.CDLL,
    x: Tensor,
    rows: list[int],
    norm: Tensor,
    weights: Mapping[str, int],
    vocabulary: int,
    softcap: float,
) -> Tensor:
    """The logits, float32 [rows, vocabulary]. ``weights``: the fields of ``HeadCall`` for the weights."""
    index = torch.tensor(rows)
    out = torch.full((len(rows), -(-vocabulary // 16) * 16), torch.nan)
    normed = torch.empty(len(rows), x.shape[1], dtype=torch.bfloat16)
    call = HeadCall(
        x=x.data_ptr(),
        rows=index.data_ptr(),
        n=len(rows),
        hidden=x.shape[1],
        vocabulary=vocabulary,
        norm=norm.data_ptr(),
        eps=1e-5,
        softcap=softcap,
        normed=normed.data_ptr(),
        out=out.data_ptr(),
        **weights,
    )
    loaded.manylora_head(byref(call))
    return out[:, :vocabulary]


@dataclass(frozen=True)
class Kind:
    """The shape and options of a layer's attention."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    scale: float = 0.2
    softcap: float = 0.0
    window: int = 0


@dataclass
class Cache:
    """One layer's pages. Places that were never written hold NaN."""

    kind: Kind
    num_tiles: int
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = self.num_tiles * self.kind.kv_heads * TILE * self.kind.head_dim
        self.keys, self.values = (torch.full((size,), torch.nan, dtype=torch.bfloat16) for _ in range(2))


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of a sequence. ``qkv`` and ``tiles`` are those of the whole sequence."""

    qkv: tuple[Tensor, Tensor, Tensor]
    tiles: list[int]
    start: int
    length: int


def attend(loaded: ctypes.CDLL, cache: Cache, pieces: list[Piece]) -> list[Tensor]:
    """Run one step, which stores keys and values. Returns [length, heads, head_dim] for each piece."""
    kind = cache.kind
    fields = {
        "positions": [p.start + i for p in pieces for i in range(p.length)],
        "sequences": [n for n, p in enumerate(pieces) for _ in range(p.length)],
        "tile_starts": np.cumsum([0, *(len(p.tiles) for p in pieces[:-1])]).tolist(),
        "tiles": [tile for p in pieces for tile in p.tiles],
        "kv_slots": [
            p.tiles[t // TILE] * TILE + t % TILE for p in pieces for t in range(p.start, p.start + p.length)
        ],
    }
    arrays = {name: np.array(values, np.int64) for name, values in fields.items()}
    tokens = Tokens(
        count=len(arrays["positions"]), **{name: array.ctypes.data for name, array in arrays.items()}
    )
    pages = Pages(cache.keys.data_ptr(), cache.values.data_ptr(), kind.kv_heads, kind.head_dim)
    parts = [torch.cat([p.qkv[i][p.start : p.start + p.length] for p in pieces]).flatten(1) for i in range(3)]
    side_by_side = torch.cat(parts, dim=1)  # the layout of the fused block
    stride, size = side_by_side.shape[1], side_by_side.element_size()
    q_size, kv_size = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    out = torch.full((len(side_by_side), kind.heads, kind.head_dim), torch.nan, dtype=torch.bfloat16)
    call = AttentionCall(
        pages=addressof(pages),
        tokens=addressof(tokens),
        q=side_by_side.data_ptr(),
        k=side_by_side.data_ptr() + q_size * size,
        v=side_by_side.data_ptr() + (q_size + kv_size) * size,
        q_stride=stride,
        k_stride=stride,
        v_stride=stride,
        out=out.data_ptr(),
        heads=kind.heads,
        scale=kind.scale,
        softcap=kind.softcap,
        window=kind.window,
    )
    loaded.manylora_attention(byref(call))
    return list(torch.split(out, [p.length for p in pieces]))
