"""x W^T for W in NF4 and up to ``MOST_ROWS`` rows of x, in Triton: the 4-bit weights are read once.

W is packed as by bitsandbytes: two weights in each byte, the even one of a row in the high nibble, and a
float32 scale for each ``blocksize`` weights of a row. A decoded weight is bit-identical to bitsandbytes':
code[nibble] * scale in float32, rounded to x's type. Sums are in float32.

A program computes an N tile of W's rows with all rows of x, so each weight is decoded once. It never
interleaves the two weights of a byte. Instead it multiplies the high nibbles with the even columns of x and
the low nibbles with the odd columns. A first launch writes these columns apart, so that the loop copies both
to shared memory asynchronously. Splitting x in the loop, through registers, takes a fifth longer for up to 32
rows (H200, Triton 3.6). The product is W x^T, and not x W^T: tensor cores need 64 rows on the
left, and the left operand may stay in registers.

Such a product is bound by decoding and by memory: at an H100's bandwidth a multiprocessor receives 26 weights
in each cycle and issues 128 instructions. So the code book is in the registers of a warp's lanes, and one
shuffle instruction looks up an exact float32. Its index needs no mask, because the book is there twice: a
lane number has five bits, and the fifth may belong to the next nibble. Triton's own lookups take two address
computations for each weight (``tl.load``) or a barrier for each tile (``tl.gather``). Selecting bytes
(PRMT) runs at half rate and cannot give float32. In total it is about 5 instructions for each weight on
compute capability 9.0. On an H200 it decodes 7 weights in each cycle of a multiprocessor: Triton decodes in
the layout of the load and moves the decoded weights to the layout of the product through shared memory.

If there are few N tiles, K is split, and a second launch adds up the parts in order: without atomics, with
the same bits every time. Launches depend on shapes alone, so they may run in a CUDA graph. The first call
compiles, so it must run outside a graph. Only this file imports Triton for it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.engine.unsupported import Unsupported

MOST_ROWS = 128

TILE_K = 64
"""Weights of a row in one iteration of the loop: 32 bytes, a GPU's smallest memory transaction."""

_MOST_PARTS = 8
_FEWEST_TILES = 4
"""Least tiles of K in a part: a shorter loop never fills its stages."""

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Form:
    """Compile-time constants for up to ``rows`` rows.

    Attributes:
        n: outputs of a program. x is read from the cache once for each N tile, so more rows need wider tiles.
        stages: of the loop. The tiles of x limit the number of stages that fit.
        warps_per_sm: K is split until each multiprocessor has this many.
    """

    rows: int
    n: int
    warps: int
    stages: int
    warps_per_sm: int


FORMS = (
    Form(16, 128, 4, 4, 32),
    Form(32, 64, 4, 5, 32),
    Form(64, 128, 8, 4, 16),
    Form(MOST_ROWS, 128, 8, 3, 16),
)
"""The fastest over an 8B model's four products on an H200, of 17 forms with several splits. They use at most
75 KB of shared memory; a program may use 99 KB from compute capability 8.0 on."""


def check_weight(inputs: int, blocksize: int, quant_type: str) -> Unsupported | None:
    """Why this kernel does not support such weights, or None."""
    if quant_type != "nf4" or blocksize % TILE_K or inputs % blocksize:
        return Unsupported(
            f"{quant_type} in blocks of {blocksize} is not NF4 in blocks of a multiple of {TILE_K}"
        )
    return None


def product(
    x: Tensor, packed: Tensor, scales: Tensor, code: Tensor, outputs: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias, [rows, outputs] of x's type.

    Args:
        x: bf16 or fp16 [rows, inputs], 1 to ``MOST_ROWS`` rows.
        packed: uint8 [outputs * inputs / 2], row by row.
        scales: float32, one for each block of each row.
        code: float32 [16].
        bias: of x's type.
    """
    x = x.contiguous()
    rows, inputs = x.shape
    form = next(form for form in FORMS if rows <= form.rows)
    tiles = triton.cdiv(outputs, form.n)
    parts, part_tiles = split(
        inputs // TILE_K, tiles * form.warps, form.warps_per_sm * _multiprocessors(x.device)
    )
    columns = x.new_empty(2, rows, inputs // 2)
    words = columns[0].numel()
    _split_columns[triton.cdiv(words, _WORDS),](columns, x.view(torch.int32), words, _WORDS, num_warps=4)
    y = x.new_empty(rows, outputs)
    sums = y if parts == 1 else x.new_empty(parts, rows, outputs, dtype=torch.float32)
    blocksize = outputs * inputs // scales.numel()
    _multiply[tiles, parts](
        sums, columns, packed, scales, code, bias if parts == 1 else None, rows, outputs, inputs,
        part_tiles, **constants(form, x.dtype, blocksize), num_warps=form.warps,
    )  # fmt: skip
    if parts > 1:
        _add_parts[triton.cdiv(outputs, _ADDED), rows](
            y, sums, bias, rows, outputs, parts, _MOST_PARTS, _ADDED, num_warps=4
        )
    return y


def split(tiles: int, warps: int, wanted_warps: int) -> tuple[int, int]:
    """The number of parts that K is split into, and the number of tiles in each part.

    Args:
        tiles: tiles of K.
        warps: warps of all programs without a split.
        wanted_warps: warps that keep the device busy.
    """
    wanted = min(wanted_warps // warps, tiles // _FEWEST_TILES, _MOST_PARTS)
    part = triton.cdiv(tiles, max(wanted, 1))
    return triton.cdiv(tiles, part), part


@cache
def constants(form: Form, dtype: torch.dtype, blocksize: int) -> dict[str, object]:
    """The compile-time constants. Triton's interpreter has no PTX and would multiply bf16 as integers."""
    kind = _TYPES[dtype]
    interpreted = triton.knobs.runtime.interpret
    return {
        "TYPE": kind,
        "DOT": tl.float32 if interpreted else kind,
        "PTX": not interpreted,
        "ROWS": form.rows,
        "BLOCK_N": form.n,
        "BLOCK_K": TILE_K,
        "BLOCKSIZE": blocksize,
        "STAGES": form.stages,
    }


def decode_ptx(dtype: torch.dtype) -> str:
    """PTX that decodes four adjacent bytes to their high and their low weights, in pairs.

    $0 and $1 are the high weights, $2 and $3 the low ones. $4 is the bytes, $5 to $8 are their scales, $9 to
    $12 are four times the lane's entry of the code book.
    """
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    lines = [".reg .f32 w<8>;", ".reg .b32 s;"]
    for i in range(8):  # low and high of the first byte, then of the next
        lines += [
            f"shr.u32 s, $4, {4 * i};",
            f"shfl.sync.idx.b32 w{i}, $9, s, 31, 0xffffffff;",
            f"mul.rn.f32 w{i}, w{i}, ${5 + i // 2};",
        ]
    lines += [f"cvt.rn.{kind}.f32 ${i}, w{4 * i + 3}, w{4 * i + 1};" for i in range(2)]
    lines += [f"cvt.rn.{kind}.f32 ${2 + i}, w{4 * i + 2}, w{4 * i};" for i in range(2)]
    return "{\n" + "\n".join(lines) + "\n}"


_TO_BF16, _TO_FP16 = (tl.constexpr(decode_ptx(dtype)) for dtype in (torch.bfloat16, torch.float16))

_LANE_CODE = tl.constexpr("""{
.reg .u32 lane;
.reg .u64 at;
mov.u32 lane, %laneid;
and.b32 lane, lane, 15;
mul.wide.u32 at, lane, 4;
add.u64 at, at, $1;
ld.global.nc.f32 $0, [at];
}""")
"""Loads the lane's entry of the code book at address $1. Triton sees a scalar, but each lane has its own."""

_WORDS = 1024
"""Words of x of a program that splits columns: eight for each thread."""

_ADDED = 512
"""Outputs of a program that adds up parts: four for each thread, which reads all parts of them."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["M", "part_tiles"])
def _multiply(
    sums, x, packed, scales, codes, bias, M, N, K, part_tiles,
    TYPE: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCKSIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums[part, m, n] = bias[n] + sum over k in part of x[m, k] * W[n, k]

    Grid: (N tiles, parts of K). Beyond M and N the last row is computed again, so loads need no mask.

    Args:
        sums: float32 [parts, M, N], or y itself.
        x: [2, M, K / 2], the even columns and then the odd ones.
        part_tiles: tiles of BLOCK_K in a part.
        PTX: decode with ``decode_ptx``; else in Triton, with the same result.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    pair = tl.arange(0, HALF)
    row = tl.minimum(n, N - 1).to(tl.int64)
    width = K // BLOCK_K * HALF  # tells the compiler that rows begin at multiples of 16 bytes
    of_w = packed + row[:, None] * width + pair[None, :]
    of_even = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * width + pair[:, None]
    of_odd = of_even + M.to(tl.int64) * width
    of_scale = scales + row * (K // BLOCKSIZE)
    lane_code = 0.0
    if PTX:
        lane_code = tl.inline_asm_elementwise(
            _LANE_CODE, "=f,l", [codes], dtype=tl.float32, is_pure=True, pack=1
        )

    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    first = tl.program_id(1) * part_tiles
    for tile in tl.range(first, tl.minimum(first + part_tiles, K // BLOCK_K), num_stages=STAGES):
        weights = tl.load(of_w + tile * HALF)
        even = tl.load(of_even + tile * HALF)
        odd = tl.load(of_odd + tile * HALF)
        scale = tl.load(of_scale + tile * BLOCK_K // BLOCKSIZE)[:, None]
        scale = tl.broadcast_to(scale, (BLOCK_N, HALF))
        high, low = _decode(weights, scale, codes, lane_code, TYPE, PTX)
        total = tl.dot(high.to(DOT), even.to(DOT), total, input_precision="ieee")
        total = tl.dot(low.to(DOT), odd.to(DOT), total, input_precision="ieee")

    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    at = sums + (tl.program_id(1) * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, total.to(sums.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _decode(weights, scale, codes, lane_code, TYPE: tl.constexpr, PTX: tl.constexpr):
    """The high and the low weights of the bytes."""
    if PTX:
        high, low = tl.inline_asm_elementwise(
            _TO_FP16 if TYPE.is_fp16() else _TO_BF16, "=r,=r,=r,=r,r,f,f,f,f,f,f,f,f",
            [weights, scale, lane_code], dtype=(tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
        high, low = high.to(TYPE, bitcast=True), low.to(TYPE, bitcast=True)
    else:
        high = (tl.load(codes + (weights >> 4)) * scale).to(TYPE)
        low = (tl.load(codes + (weights & 15)) * scale).to(TYPE)
    return high, low


@triton.jit(do_not_specialize=["words"])
def _split_columns(columns, x, words, BLOCK: tl.constexpr):
    """Write x's even columns to columns[0] and its odd ones to columns[1]. Grid: (blocks of words,).

    Args:
        x: int32 [words], each an even column (low half) and the odd column after it.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < words, other=0)
    kind = columns.dtype.element_ty
    tl.store(columns + i, (values & 0xFFFF).to(tl.int16).to(kind, bitcast=True), mask=i < words)
    tl.store(columns + words + i, (values >> 16).to(tl.int16).to(kind, bitcast=True), mask=i < words)


@triton.jit(do_not_specialize=["M", "parts"])
def _add_parts(y, sums, bias, M, N, parts, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[m, n] = bias[n] + sum over parts of sums[part, m, n]. Grid: (blocks of N, rows).

    Args:
        PARTS: a power of two, at least ``parts``. All parts are read at once.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.arange(0, PARTS)
    at = tl.program_id(1).to(tl.int64) * N + n
    total = tl.sum(
        tl.load(
            sums + part.to(tl.int64)[:, None] * M * N + at[None, :],
            mask=(part < parts)[:, None] & (n < N)[None, :],
            other=0.0,
        ),
        0,
    )
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=n < N)
