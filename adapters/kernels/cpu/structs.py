"""The structs of ``src/native.h``, field for field."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_float, c_int64, c_void_p
from typing import Any


def _struct(name: str, **fields: Any) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


LoraSite = _struct(
    "LoraSite",
    a=c_void_p,
    b=c_void_p,
    inputs=c_int64,
    outputs=c_int64,
    rows=c_void_p,
    ranks=c_void_p,
    adjusts=c_void_p,
)
LoraCall = _struct(
    "LoraCall",
    sites=c_void_p,
    y=c_void_p,
    y_strides=c_void_p,
    n_sites=c_int64,
    x=c_void_p,
    x_stride=c_int64,
    segments=c_void_p,
    n_segments=c_int64,
)
Pages = _struct("Pages", keys=c_void_p, values=c_void_p, kv_heads=c_int64, head_dim=c_int64)
Tokens = _struct(
    "Tokens",
    count=c_int64,
    kv_slots=c_void_p,
    positions=c_void_p,
    sequences=c_void_p,
    tile_starts=c_void_p,
    tiles=c_void_p,
)
AttentionCall = _struct(
    "AttentionCall",
    pages=c_void_p,
    tokens=c_void_p,
    q=c_void_p,
    k=c_void_p,
    v=c_void_p,
    q_stride=c_int64,
    k_stride=c_int64,
    v_stride=c_int64,
    out=c_void_p,
    heads=c_int64,
    scale=c_float,
    softcap=c_float,
    window=c_int64,
)
Linear = _struct(
    "Linear",
    w=c_void_p,
    absmax=c_void_p,
    bias=c_void_p,
    inputs=c_int64,
    outputs=c_int64,
    blocksize=c_int64,
    lora=c_void_p,
)
LinearCall = _struct(
    "LinearCall",
    linears=c_void_p,
    y=c_void_p,
    n_linears=c_int64,
    y_stride=c_int64,
    x=c_void_p,
    x_stride=c_int64,
    count=c_int64,
    codebook=c_void_p,
)
ExpertsCall = _struct(
    "ExpertsCall",
    w=c_void_p,
    absmax=c_void_p,
    inputs=c_int64,
    outputs=c_int64,
    blocksize=c_int64,
    chosen=c_void_p,
    starts=c_void_p,
    n_chosen=c_int64,
    x=c_void_p,
    y=c_void_p,
    codebook=c_void_p,
)
Norm = _struct("Norm", weight=c_void_p, by_slot=c_void_p)
Product = _struct("Product", parts=Linear * 3, n=c_int64)
Block = _struct(
    "Block",
    qkv=Product,
    o=Product,
    gate_up=Product,
    down=Product,
    norm_before_attention=Norm,
    norm_after_attention=Norm,
    norm_before_mlp=Norm,
    norm_after_mlp=Norm,
    q_norm=Norm,
    k_norm=Norm,
    pages=Pages,
    cosines=c_void_p,
    sines=c_void_p,
    window=c_int64,
)
Scratch = _struct(
    "Scratch", normed=c_void_p, qkv=c_void_p, attended=c_void_p, gate_up=c_void_p, delta=c_void_p
)
StackCall = _struct(
    "StackCall",
    blocks=c_void_p,
    n_blocks=c_int64,
    hidden=c_int64,
    heads=c_int64,
    head_dim=c_int64,
    intermediate=c_int64,
    rotary_dim=c_int64,
    eps=c_float,
    scale=c_float,
    softcap=c_float,
    gelu=c_int64,
    codebook=c_void_p,
    x=c_void_p,
    tokens=c_void_p,
    segments=c_void_p,
    n_segments=c_int64,
    norm_slots=c_void_p,
    scratch=Scratch,
    nanoseconds=c_void_p,
)
STACK_PARTS = ("linears", "lora", "attention", "rows")
"""The order of ``StackCall.nanoseconds``."""

HeadCall = _struct(
    "HeadCall",
    x=c_void_p,
    rows=c_void_p,
    n=c_int64,
    hidden=c_int64,
    vocabulary=c_int64,
    norm=c_void_p,
    eps=c_float,
    softcap=c_float,
    w=c_void_p,
    nf4=c_void_p,
    codebook=c_void_p,
    normed=c_void_p,
    out=c_void_p,
)


def address(struct: Structure) -> int:
    return ctypes.addressof(struct)
