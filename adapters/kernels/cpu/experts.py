"""Products with NF4 experts by the native kernel (``adapters/kernels/cpu/src/nf4.h``), for bf16 on a CPU.

Its result for a row is the same, bit for bit, whatever other rows the expert has.
"""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from adapters.kernels.cpu.structs import ExpertsCall


def multiply_experts(
    library: ctypes.CDLL, x: Tensor, packed: Tensor, scales: Tensor, code: Tensor, counts: list[int]
) -> Tensor:
    """[rows, outputs] of x's rows, which are sorted by expert, with the weights of their experts.

    Args:
        x: bf16 [rows, inputs].
        packed: uint8 [experts, outputs / 32, inputs / 2, 32], see ``adapters/base/panels.py``.
        scales: bf16 [experts, inputs / blocksize, outputs].
        code: bf16 [16], NF4's values.
        counts: the number of rows of each expert.
    """
    x = x.contiguous()
    rows, inputs = x.shape
    experts, blocks, outputs = scales.shape
    assert len(counts) == experts == len(packed)
    assert sum(counts) == rows
    assert packed.numel() * 2 == experts * inputs * outputs
    assert x.dtype == scales.dtype == code.dtype == torch.bfloat16
    sizes = np.array(counts, np.int64)
    (chosen,) = np.nonzero(sizes)
    starts = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(sizes[chosen], out=starts[1:])
    y = torch.empty(rows, outputs, dtype=torch.bfloat16)
    call = ExpertsCall(
        w=packed.data_ptr(),
        absmax=scales.data_ptr(),
        inputs=inputs,
        outputs=outputs,
        blocksize=inputs // blocks,
        chosen=chosen.ctypes.data,
        starts=starts.ctypes.data,
        n_chosen=len(chosen),
        x=x.data_ptr(),
        y=y.data_ptr(),
        codebook=code.data_ptr(),
    )
    library.manylora_experts(byref(call))
    return y
