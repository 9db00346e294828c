"""A random linear in NF4, in the packed form that the native kernels read."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from adapters.kernels.cpu.structs import Linear


class Nf4Linear:
    """A random linear in bitsandbytes' packed form, and its dense values."""

    def __init__(self, inputs: int, outputs: int, seed: int, bias: bool, blocksize: int = 64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.outputs, self.blocksize = inputs, outputs, blocksize
        self.codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
        self.absmax = (torch.rand(inputs // blocksize, outputs, generator=generator) + 0.1).bfloat16()
        self.bias = torch.randn(outputs, generator=generator).bfloat16() if bias else None
        self.packed = self._pack()

    def _pack(self) -> Tensor:
        """Pack as bitsandbytes' ``_convert_weight_packed_for_cpu``: panels of 32 outputs, pairs of inputs."""
        panels = self.codes.view(self.outputs // 32, 32, self.inputs // 2, 2).transpose(1, 2).reshape(-1, 64)
        return ((panels[:, 32:] << 4) | panels[:, :32]).to(torch.uint8).contiguous()

    def struct(self) -> Linear:  # type: ignore[valid-type]
        bias = self.bias.data_ptr() if self.bias is not None else None
        return Linear(
            self.packed.data_ptr(),
            self.absmax.data_ptr(),
            bias,
            self.inputs,
            self.outputs,
            self.blocksize,
            None,
        )

    def dense(self) -> Tensor:
        """The weights, float32 [outputs, inputs]."""
        return codebook()[self.codes].float() * self.absmax.float().repeat_interleave(self.blocksize, 0).T

    def expected(self, x: Tensor) -> Tensor:
        y = x.float() @ self.dense().T
        return y if self.bias is None else y + self.bias.float()


def codebook() -> Tensor:
    values: Tensor = bnb.get_4bit_type("nf4", device="cpu").bfloat16()
    return values
