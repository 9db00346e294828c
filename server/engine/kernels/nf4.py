"""x W^T for W in NF4 and up to ``MOST_ROWS`` rows of x, in Triton: the 4-bit weights are read once.

W is packed as by bitsandbytes: two weights in each byte, the even one of a row in the high nibble, and a
float32 scale for each ``blocksize`` weights of a row. A decoded weight is bit-identical to bitsandbytes':
code[nibble] * scale in float32, rounded to x's type. Sums are in float32.

A program computes an N tile of W's rows with all rows of x, so each weight is decoded once. The product is
W x^T, and not x W^T: tensor cores need 64 rows on the left, and the left operand may stay in registers.

Decoded weights never leave the registers of the thread that copied their bytes. The order of K's columns in a
product is free, so each tile of 128 columns is permuted to the order in which tensor cores expect the 32
weights that one thread has of a row (``_thread_order``). A first launch permutes x alike. W's rows are
permuted within a tile, too, so that Triton gives each lane and warp the same rows as a tensor core does.

Such a product is bound by decoding and by memory: at an H100's bandwidth a multiprocessor receives 26 weights
in each cycle and issues 128 instructions. So the code book is in the registers of a warp's lanes, and one
shuffle instruction looks up an exact float32. Its index needs no mask, because the book is there twice: a
lane number has five bits, and the fifth may belong to the next nibble. Triton's own lookups take two address
computations for each weight (``tl.load``) or a barrier for each tile (``tl.gather``). Selecting bytes
(PRMT) runs at half rate and cannot give float32. In total it is about 5 instructions for each weight on
compute capability 9.0.

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

TILE_K = 128
"""Columns of one iteration of the loop: 64 bytes of a row, 16 for each of four threads."""

_SCALED = 64
"""A block of weights with one scale has a multiple of this many columns."""

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
    Form(16, 128, 4, 4, 16),
    Form(32, 128, 4, 4, 12),
    Form(64, 128, 8, 3, 16),
    Form(MOST_ROWS, 128, 8, 2, 8),
)
"""As many warps as registers allow, and at most 76 KB of shared memory; a program may use 99 KB from compute
capability 8.0 on."""


def check_weight(inputs: int, blocksize: int, quant_type: str) -> Unsupported | None:
    """Why this kernel does not support such weights, or None."""
    if quant_type != "nf4" or blocksize % _SCALED or inputs % blocksize:
        return Unsupported(
            f"{quant_type} in blocks of {blocksize} is not NF4 in blocks of a multiple of {_SCALED}"
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
    tiles, tiles_k = triton.cdiv(outputs, form.n), triton.cdiv(inputs, TILE_K)
    parts, part_tiles = split(tiles_k, tiles * form.warps, form.warps_per_sm * _multiprocessors(x.device))
    permuted = x.new_empty(rows, tiles_k * TILE_K)
    _permute_columns[triton.cdiv(permuted.shape[1], _PERMUTED), rows](
        permuted, x, inputs, tiles_k * TILE_K, _PERMUTED, num_warps=4
    )
    y = x.new_empty(rows, outputs)
    sums = y if parts == 1 else x.new_empty(parts, rows, outputs, dtype=torch.float32)
    blocksize = outputs * inputs // scales.numel()
    _multiply[tiles, parts](
        sums, permuted, packed, scales, code, bias if parts == 1 else None, rows, outputs, inputs, part_tiles,
        **constants(form, x.dtype, blocksize, inputs % TILE_K == 0), num_warps=form.warps,
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
def constants(form: Form, dtype: torch.dtype, blocksize: int, whole: bool) -> dict[str, object]:
    """The compile-time constants. ``whole``: K is a multiple of ``TILE_K``.
    Triton's interpreter has no PTX and would multiply bf16 as integers.
    """
    kind = _TYPES[dtype]
    interpreted = triton.knobs.runtime.interpret
    return {
        "TYPE": kind,
        "DOT": tl.float32 if interpreted else kind,
        "PTX": not interpreted,
        "ROWS": form.rows,
        "BLOCK_N": form.n,
        "WARPS": form.warps,
        "BLOCKSIZE": blocksize,
        "WHOLE": whole,
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

_PERMUTED = 1024
"""Columns of x of a program that permutes them: eight for each thread."""

_ADDED = 512
"""Outputs of a program that adds up parts: four for each thread, which reads all parts of them."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _thread_order(k):
    """The column whose product is the k-th of its tile.

    Tensor cores give thread t of four the columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16. Here these are
    four columns of the 32 that the thread has: two bytes' high nibbles (even columns), then their low ones.
    """
    step, half, thread, pair = k // 16, k // 8 % 2, k // 2 % 4, k % 2
    return k // 128 * 128 + 32 * thread + 4 * (step % 8) + 2 * pair + half


@triton.jit
def _permute_columns(permuted, x, K, width, BLOCK: tl.constexpr):
    """permuted[m, k] = x[m, _thread_order(k)], or 0 beyond K. Grid: (blocks of width, rows)."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    column = _thread_order(k)
    values = tl.load(x + m * K + column, mask=column < K, other=0.0)
    tl.store(permuted + m * width + k, values, mask=k < width)


@triton.jit(do_not_specialize=["M", "part_tiles"])
def _multiply(
    sums, x, packed, scales, codes, bias, M, N, K, part_tiles,
    TYPE: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr, BLOCKSIZE: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums[part, m, n] = bias[n] + sum over k in part of x[m, k] * W[n, k]

    Grid: (N tiles, parts of K). Beyond M and N the last row is computed again, so loads need no mask.

    Args:
        sums: float32 [parts, M, N], or y itself.
        x: [M, K], in the order of ``_thread_order``, with zeros beyond K to a multiple of 128 columns.
        part_tiles: tiles of 128 columns in a part.
        PTX: decode with ``decode_ptx``; else in Triton, with the same result.
        WHOLE: K is a multiple of 128; else its last tile has 64 columns.
    """
    # Triton gives neighbouring rows of a tile to a warp's lanes, then to warps, then to registers. A tensor
    # core wants the ninth row in the first lane again, so the tile's rows are these of W:
    REPEATS: tl.constexpr = BLOCK_N // (16 * WARPS)
    i = tl.arange(0, BLOCK_N)
    lane, warp, half, repeat = i % 8, i // 8 % WARPS, i // (8 * WARPS) % 2, i // (16 * WARPS)
    row = tl.program_id(0) * BLOCK_N + repeat * (16 * WARPS) + warp * 16 + half * 8 + lane
    row = tl.minimum(row, N - 1).to(tl.int64)[:, None]
    byte, thread = tl.arange(0, 64)[None, :], tl.arange(0, 4)[None, :]
    width = K // 64 * 32  # tells the compiler that rows begin at multiples of 16 bytes
    of_w = packed + row * width + byte
    of_scale = scales + row * (K // BLOCKSIZE)
    m = tl.arange(0, ROWS)
    x_width = (K + 127) // 128 * 128
    of_x = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_width + tl.arange(0, 128)[:, None]
    lane_code = 0.0
    if PTX:
        lane_code = tl.inline_asm_elementwise(
            _LANE_CODE, "=f,l", [codes], dtype=tl.float32, is_pure=True, pack=1
        )

    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    first = tl.program_id(1) * part_tiles
    for tile in tl.range(first, tl.minimum(first + part_tiles, x_width // 128), num_stages=STAGES):
        values = tl.load(of_x + tile * 128)
        block = (tile * 128 + thread * 32) // BLOCKSIZE
        if WHOLE:
            weights, scale = tl.load(of_w + tile * 64), tl.load(of_scale + block)
        else:
            weights = tl.load(of_w + tile * 64, mask=tile * 64 + byte < width, other=0)
            scale = tl.load(of_scale + block, mask=block < K // BLOCKSIZE, other=0.0)
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, 4, 16)).reshape(BLOCK_N, 64)
        high, low = _decode(weights, scale, codes, lane_code, TYPE, PTX)
        decoded = tl.join(high, low).reshape(REPEATS, 2, WARPS, 8, 4, 8, 2, 2)
        decoded = decoded.permute(0, 2, 1, 3, 5, 7, 4, 6).reshape(BLOCK_N, 128)
        total = tl.dot(decoded.to(DOT), values.to(DOT), total, input_precision="ieee")

    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        total += tl.load(bias + tl.minimum(n, N - 1)).to(tl.float32)[:, None]
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
