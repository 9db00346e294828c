"""A Llama-like model's weights for the native stack: addresses into the loaded model."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from adapters.kernels.cpu.structs import Block, Linear, Norm
from adapters.pool.rank_pool import RankPool
from server.engine.attention import AttentionSpec
from server.engine.model.llama_like import decoder_name, decoder_of, norm_weight, norms_of, products_of


class CpuWeights:
    """The ``Block`` structs of all layers, and the tensors that they point at and the model does not hold.

    Args:
        model: transformers' model. Its linears are already wrapped for adapters and packed for the CPU.

    Attributes:
        head: the fields of ``HeadCall`` for the head's weights.
    """

    def __init__(self, model: Any, pool: RankPool, specs: Mapping[int, AttentionSpec]) -> None:
        self._model = model
        self._kept: list[Tensor] = []
        decoder, name = decoder_of(model), decoder_name(model)
        layers = decoder.layers
        self.blocks = (Block * len(layers))()
        for i, layer in enumerate(layers):
            self._fill(self.blocks[i], f"{name}.layers.{i}", layer, pool)
            self.blocks[i].window = specs[i].window or 0
        self.codebook = self._keep(self._codebook())
        self.final_norm = self._keep(self.norm_weight(decoder.norm.weight.detach()))
        self.head = self._head(model.lm_head)

    def _fill(self, block: ctypes.Structure, name: str, layer: Any, pool: RankPool) -> None:
        for field, paths in products_of(self._model).items():
            product = getattr(block, field)
            product.n = len(paths)
            for i, path in enumerate(paths):
                lora = addressof(pool.sites[f"{name}.{path}"].native)
                product.parts[i] = self._linear(layer.get_submodule(path).base, lora)
        for field, path in norms_of(self._model, layer).items():
            setattr(block, field, self._norm(layer.get_submodule(path), pool, f"{name}.{path}"))

    def _head(self, module: Any) -> dict[str, int]:
        if not is_4bit(module.base):
            return {"w": self._keep(pack_head(module.base.weight.detach())).data_ptr()}
        self._four_bit_head = self._linear(module.base, None)
        return {"nf4": addressof(self._four_bit_head), "codebook": self.codebook.data_ptr()}

    def _linear(self, base: Any, lora: int | None) -> ctypes.Structure:
        state = base.weight.quant_state
        bias = None if base.bias is None else self._keep(base.bias.detach().to(torch.bfloat16))
        return Linear(
            w=base.weight.data_ptr(),
            absmax=state.absmax.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            inputs=base.in_features,
            outputs=base.out_features,
            blocksize=state.blocksize,
            lora=lora,
        )

    def norm_weight(self, weight: Tensor) -> Tensor:
        """The weight that the native norm multiplies by: float32."""
        return norm_weight(self._model, weight)

    def _norm(self, module: Any, pool: RankPool, name: str) -> ctypes.Structure:
        weight = self._keep(self.norm_weight(module.weight.detach()))
        table = pool.extras.norms.get(name)
        return Norm(weight=weight.data_ptr(), by_slot=None if table is None else table.cell)

    def _codebook(self) -> Tensor:
        """NF4's sixteen values in bf16, from bitsandbytes."""
        (path,) = products_of(self._model)["o"]
        code: Tensor = decoder_of(self._model).layers[0].get_submodule(path).base.weight.quant_state.code
        return code.detach().to(torch.bfloat16)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.contiguous())
        return self._kept[-1]


def is_4bit(linear: Any) -> bool:
    """Whether a linear is NF4, packed by bitsandbytes for this CPU."""
    state: Any = getattr(linear.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False) and state.quant_type == "nf4")


def pack_head(weight: Tensor) -> Tensor:
    """[vocabulary, hidden] -> [groups, hidden / 2, 16, 2]: the weights of sixteen words are interleaved."""
    vocabulary, hidden = weight.shape
    groups = -(-vocabulary // 16)
    padded = torch.zeros(groups * 16, hidden, dtype=torch.bfloat16)
    padded[:vocabulary] = weight
    return padded.view(groups, 16, hidden // 2, 2).transpose(1, 2).contiguous()
