"""The native kernel (``adapters/kernels/cpu/src/lora.h``), for bf16 on a CPU.

Unlike torch's products, its result for a token is the same, bit for bit, whatever else is in the step.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, byref, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from adapters.kernels import Segment, check_extents
from adapters.kernels.cpu.structs import LoraCall
from adapters.pool.site_pool import SitePool


class NativeLora:
    """See ``adapters/kernels/__init__.py``. Not thread-safe: a model has one, on the engine's thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.manylora_lora
        self._segments: list[Segment] = []
        self._packed = np.zeros((0, 3), np.int64)
        self._site, self._y, self._y_stride = c_void_p(), c_void_p(), c_int64()
        self._call = LoraCall(
            sites=addressof(self._site), y=addressof(self._y), y_strides=addressof(self._y_stride), n_sites=1
        )

    def __call__(self, y: Tensor, x: Tensor, pool: SitePool, segments: list[Segment]) -> None:
        check_extents(y, x, pool, segments)
        assert x.dtype == y.dtype == torch.bfloat16
        assert x.stride(1) == y.stride(1) == 1
        call = self._call
        if segments is not self._segments:  # once for each step: all its layers pass the same list
            self._segments, self._packed = segments, np.array(segments, np.int64).reshape(-1, 3)
            call.segments, call.n_segments = self._packed.ctypes.data, len(segments)
        self._site.value, self._y.value, self._y_stride.value = (
            addressof(pool.native),
            y.data_ptr(),
            y.stride(0),
        )
        call.x, call.x_stride = x.data_ptr(), x.stride(0)
        self._run(byref(call))
