"""How Triton compiles the product of NF4 weights, and how its PTX decodes them. See ``nf4_cases.py`` too."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor

from tests.support.triton_running import compile_for

nf4 = pytest.importorskip("server.engine.kernels.nf4")

LANES = 32
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TARGETS = [(80, torch.float16), (90, torch.bfloat16)]


def packed_pair(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """PTX's cvt of two float32 values to one register. The first argument is the upper half."""

    def pair(upper: Tensor, lower: Tensor) -> Tensor:
        halves = torch.stack([lower, upper], 1).to(dtype).view(torch.int16)
        return halves.view(torch.int32).flatten()

    return pair


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "shr.u32": lambda a, n: ((a.long() & 0xFFFFFFFF) >> n).to(torch.int64),
    "shfl.sync.idx.b32": lambda a, lane, *_whole_warp: a[lane & 31],
    "mul.rn.f32": lambda a, b: a * b,
    "cvt.rn.bf16x2.f32": packed_pair(torch.bfloat16),
    "cvt.rn.f16x2.f32": packed_pair(torch.float16),
}


def run_ptx(text: str, registers: dict[str, Tensor]) -> None:
    """Run PTX for the 32 lanes of a warp. A register is a tensor with one value for each lane."""
    for line in text.strip("{}\n").splitlines():
        operation, *operands = re.split(r",?\s+", line.rstrip(";"))
        if operation == ".reg":
            continue
        values = [registers[name] if name in registers else int(name, 0) for name in operands[1:]]
        registers[operands[0]] = OPERATIONS[operation](*values)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_ptx_decodes_the_same_bits_as_bitsandbytes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    code = get_4bit_type("nf4", device="cpu")
    every = torch.randperm(256, generator=generator).to(torch.uint8).view(2, LANES, 4)
    for weights in every:
        scales = torch.rand(4, generator=generator)  # each for 64 weights, which are in eight lanes
        state = QuantState(scales, torch.Size([1, 256]), code, 64, "nf4", dtype)
        expected = dequantize_4bit(weights.view(-1, 1), state).view(LANES, 4, 2)
        registers = {"$4": weights.view(torch.int32).flatten()}
        registers |= {f"${i}": scales.repeat_interleave(8) for i in range(5, 9)}
        registers |= {f"${i}": code.repeat(2) for i in range(9, 13)}
        run_ptx(nf4.decode_ptx(dtype), registers)
        got = torch.stack([registers[f"${i}"] for i in range(4)], 1).view(dtype).view(LANES, 2, 4)
        assert torch.equal(got.transpose(1, 2).view(torch.int16), expected.contiguous().view(torch.int16))


@pytest.fixture
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_product(form: Any, capability: int, dtype: torch.dtype, in_parts: bool) -> Any:
    values = f"*{KINDS[dtype]}"
    types = {"x": values, "packed": "*u8", "scales": "*fp32", "codes": "*fp32", "bias": values}
    constants = nf4.constants(form, dtype, 64, True) | ({"bias": None} if in_parts else {})
    types["sums"] = "*fp32" if in_parts else values
    return compile_for(capability, nf4._multiply, constants, types, {"M", "part_tiles"}, form.warps)


def spilled(compiled: Any, folder: Path) -> int:
    """The bytes that a thread spills to memory because registers are short."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("form", nf4.FORMS, ids=lambda form: f"{form.rows} rows")
def test_compiled_for_a_gpu_weights_go_from_wide_copies_through_shuffles_to_tensor_cores(
    form: Any, capability: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    compiled = compiled_product(form, capability, dtype, in_parts=form.rows != 64)
    ptx: str = compiled.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
    copies = Counter(
        int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*\], (0x\w+),", ptx)
    )
    threads = LANES * form.warps
    expected = Counter({4: form.n * 4 // threads})  # one scale for the four threads of each row
    for nbytes in (form.n * nf4.TILE_K // 2, form.rows * nf4.TILE_K * 2):  # weights and x
        expected[16] += nbytes // threads // 16
    assert copies == Counter({size: form.stages * count for size, count in expected.items()})
    assert ptx.count("shfl.sync.idx") == form.n * nf4.TILE_K / threads, (
        "each weight must be looked up once, in the loop"
    )
    assert not re.findall(r"ld\.global\.[bu]8|ld\.local|st\.local", ptx)
    loop = ptx[ptx.index("shfl.sync.idx") : ptx.rindex("mma")]
    if capability == 90:
        assert "st.shared" not in loop, "decoded weights must stay in their thread's registers"
    assert spilled(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.usefixtures("_fresh_cache")
def test_compiled_for_a_gpu_parts_are_added_without_shared_memory() -> None:
    types = {"y": "*bf16", "sums": "*fp32", "bias": "*bf16"}
    constants = {"PARTS": nf4._MOST_PARTS, "BLOCK_N": nf4._ADDED}
    compiled = compile_for(90, nf4._add_parts, constants, types, {"M", "parts"})
    assert compiled.asm["ptx"].count("ld.global.v4") == nf4._MOST_PARTS
    assert compiled.metadata.shared == 0


@pytest.mark.parametrize(
    ("outputs", "inputs", "parts"), [(6144, 4096, 5), (4096, 4096, 8), (28672, 4096, 1), (4096, 14336, 8)]
)
def test_an_8b_model_keeps_the_multiprocessors_of_an_h100_busy(outputs: int, inputs: int, parts: int) -> None:
    form = nf4.FORMS[2]
    programs, warps = outputs // form.n, form.warps_per_sm * 132
    cut, tiles = nf4.split(inputs // nf4.TILE_K, programs * form.warps, warps)
    assert cut == parts
    assert (cut - 1) * tiles < inputs // nf4.TILE_K <= cut * tiles
    assert 0.8 < cut * programs * form.warps / warps <= 1


@pytest.mark.parametrize(
    ("inputs", "blocksize", "kind", "fits"),
    [(128, 64, "nf4", True), (192, 128, "nf4", False), (128, 32, "nf4", False), (128, 64, "fp4", False)],
)
def test_unsupported_weights_are_refused(inputs: int, blocksize: int, kind: str, fits: bool) -> None:
    assert (nf4.check_weight(inputs, blocksize, kind) is None) == fits
