"""The experts of a sparse base in NF4.

transformers 5 keeps all experts of a layer in two parameters of three dimensions, which bitsandbytes does
not quantise. ``Nf4Experts`` replaces such a module. Each expert is quantised by itself, in blocks of 64
weights of a row. A scale is bf16, so a weight takes 4.25 bits.

The routing stays transformers': its router chooses the experts and their weights. A step's tokens are grouped
by expert, only chosen experts are read, and at most one expert's weights of one matrix are dequantised at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from adapters.base.panels import PANEL, pack_panels, unpack_panels
from adapters.kernels.cpu import library
from adapters.kernels.cpu.experts import multiply_experts

BLOCK = 64
"""Weights of a row that share a scale, as in bitsandbytes' linears."""

MATRICES = ("gate_up_proj", "down_proj")

SCALES = "_scales"
"""Suffix of a matrix's scales."""


class Nf4Experts(nn.Module):
    """Gated experts in NF4: down(act(gate(x)) * up(x)) for each token and chosen expert.

    Args:
        dense: transformers' module, usually on the meta device. Its sizes and its activation are used.

    Attributes:
        gate_up_proj, down_proj: uint8 [experts, outputs, inputs / 2], two weights in a byte, the first one in
            the high half, as bitsandbytes packs them.
        gate_up_proj_scales, down_proj_scales: bf16 [experts, outputs, inputs / 64]. ``pack`` changes the
            order of weights and scales.
    """

    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.num_experts, outputs, inputs = dense.gate_up_proj.shape
        self.shapes = {"gate_up_proj": (outputs, inputs), "down_proj": (inputs, outputs // 2)}
        self.act_fn = dense.act_fn
        self._dense = (dense,)  # in a tuple, so that its parameters are not this module's
        self._is_packed = False
        for name, (outputs, inputs) in self.shapes.items():
            device = getattr(dense, name).device
            sizes = self.num_experts, outputs
            packed = torch.empty(*sizes, inputs // 2, dtype=torch.uint8, device=device)
            scales = torch.empty(*sizes, inputs // BLOCK, dtype=torch.bfloat16, device=device)
            self.register_buffer(name, packed)
            self.register_buffer(name + SCALES, scales)

    @property
    def kind(self) -> str:
        """The name of transformers' class."""
        return type(self._dense[0]).__name__

    @property
    def num_weights(self) -> int:
        return sum(2 * int(getattr(self, name).numel()) for name in MATRICES)

    @property
    def bytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], as transformers' ``grouped_mm`` experts compute it.

        Args:
            top_k_index: [tokens, k] the chosen experts.
            top_k_weights: [tokens, k] by which their outputs are multiplied.
        """
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        gate, up = self.product("gate_up_proj", hidden_states[order // k], counts).chunk(2, dim=-1)
        outputs = self.product("down_proj", self.act_fn(gate) * up, counts)
        weighted = outputs * top_k_weights.reshape(-1)[order, None]
        in_order = weighted[torch.argsort(order)].view(tokens, k, weighted.shape[1])
        return in_order.sum(dim=1).to(hidden_states.dtype)

    def product(self, name: str, x: Tensor, counts: list[int]) -> Tensor:
        """[rows, inputs] -> [rows, outputs]: x W^T with each row's expert.

        Args:
            name: one of ``MATRICES``.
            counts: how many of the rows, which are sorted by expert, each expert has.
        """
        loaded = library() if self._is_packed and x.dtype == torch.bfloat16 else None
        if loaded is not None and not (torch.is_grad_enabled() and x.requires_grad):
            scales = getattr(self, name + SCALES)
            return multiply_experts(loaded, x, getattr(self, name), scales, _code(), counts)
        parts = [
            cast("Tensor", _Product.apply(rows, self, name, expert))  # type: ignore[no-untyped-call]
            for expert, rows in enumerate(torch.split(x, counts))
            if len(rows)
        ]
        return torch.cat(parts) if parts else x.new_empty(0, self.shapes[name][0])

    def dense(self, name: str, expert: int) -> Tensor:
        """bf16 [outputs, inputs]: an expert's weights, dequantised."""
        packed, scales = getattr(self, name)[expert], getattr(self, name + SCALES)[expert]
        if self._is_packed:
            packed, scales = unpack_panels(packed), scales.t()
        return dequantize(packed, scales)

    def pack(self) -> None:
        """Reorder the weights for the native kernel on a CPU, one matrix after the other."""
        if self._is_packed:
            return
        for name, (outputs, inputs) in self.shapes.items():
            usual, scales = getattr(self, name), getattr(self, name + SCALES)
            packed = torch.empty(self.num_experts, outputs // PANEL, inputs // 2, PANEL, dtype=torch.uint8)
            for expert in range(self.num_experts):
                packed[expert] = pack_panels(usual[expert])
            setattr(self, name, packed)
            setattr(self, name + SCALES, scales.transpose(1, 2).contiguous())
        self._is_packed = True

    def transformers_forward(self, *args: Tensor) -> Tensor:
        """The same with transformers' own code: it dequantises all experts of both matrices."""
        weights = {name: self._all_dense(name) for name in MATRICES}
        result: Tensor = torch.func.functional_call(self._dense[0], weights, args)
        return result

    def unpacked(self) -> nn.Module:
        """transformers' own module, frozen, with the dequantised weights."""
        dense: nn.Module = self._dense[0]
        for name in MATRICES:
            setattr(dense, name, nn.Parameter(self._all_dense(name), requires_grad=False))
        return dense

    def _all_dense(self, name: str) -> Tensor:
        device = getattr(self, name).device
        weights = torch.empty(self.num_experts, *self.shapes[name], dtype=torch.bfloat16, device=device)
        for expert in range(self.num_experts):
            weights[expert] = self.dense(name, expert)
        return weights


class _Product(torch.autograd.Function):
    """x W^T for frozen 4-bit weights. The backward pass dequantises them again, so it keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: Nf4Experts, name: str, expert: int) -> Tensor:
        ctx.weight = experts, name, expert
        return linear(x, experts.dense(name, expert).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        experts, name, expert = ctx.weight
        return gradient @ experts.dense(name, expert).to(gradient.dtype), None, None, None


def can_be_nf4(module: nn.Module) -> bool:
    """Whether ``Nf4Experts`` computes what this experts module of transformers computes.

    The module must be plain: one gate beside one up projection, transformers' default gating, no biases.
    """
    gate_up, down = (getattr(module, name, None) for name in MATRICES)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False
    is_plain = (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", True)
        and not any(getattr(module, f, False) for f in ("has_bias", "is_transposed", "has_post_expert_norm"))
        and getattr(getattr(module, "_apply_gate", None), "__name__", "") == "_default_apply_gate"
        and {name for name, _ in module.named_parameters()} == set(MATRICES)
        and all(name == "act_fn" for name, _ in module.named_children())
    )
    if not is_plain or gate_up.dim() != 3 or down.dim() != 3:
        return False
    experts, outputs, inputs = gate_up.shape
    has_whole_blocks = inputs % BLOCK == 0 and outputs % (2 * BLOCK) == 0
    return has_whole_blocks and tuple(down.shape) == (experts, inputs, outputs // 2)


def replace_experts(model: nn.Module) -> None:
    """Replace all experts of ``model`` that can be NF4. Their weights are still to be loaded."""
    for name, module in list(model.named_modules()):
        if can_be_nf4(module):
            model.set_submodule(name, Nf4Experts(module))


def nf4_experts(model: nn.Module) -> dict[str, Nf4Experts]:
    """The NF4 experts of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Nf4Experts)}


def dense_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with several experts in one parameter that is not quantised, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower()
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    }


@contextmanager
def computing_as_transformers(model: nn.Module) -> Iterator[None]:
    """While it lasts, the experts are computed by transformers' code on the dequantised weights.

    One layer's experts are dense at a time.
    """
    experts = nf4_experts(model).values()
    for module in experts:
        object.__setattr__(module, "forward", module.transformers_forward)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def pack_experts(model: nn.Module) -> None:
    """On a CPU with native kernels, reorder the experts of ``model`` for them. They still have a backward
    pass."""
    for experts in nf4_experts(model).values():
        if experts.gate_up_proj.device.type == "cpu" and library() is not None:
            experts.pack()


@cache
def _code() -> Tensor:
    """bf16 [16]: NF4's values, on the host."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type("nf4", device="cpu").bfloat16()
    return values


def quantize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, outputs, inputs] -> the weights and the scales as ``Nf4Experts`` keeps them."""
    from bitsandbytes.functional import quantize_4bit  # only 4-bit bases need it

    experts, outputs, inputs = weights.shape
    packed = torch.empty(experts, outputs, inputs // 2, dtype=torch.uint8, device=weights.device)
    scales = torch.empty(experts, outputs, inputs // BLOCK, dtype=torch.bfloat16, device=weights.device)
    for expert in range(experts):
        values, state = quantize_4bit(weights[expert].contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed[expert] = values.view(outputs, inputs // 2)
        scales[expert] = state.absmax.view(outputs, inputs // BLOCK)
    return packed, scales


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """bf16 [outputs, inputs] of one expert."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    state = QuantState(
        scales.float().flatten(),
        shape=torch.Size([outputs * inputs]),  # as one row: see ``unpack.dequantized``
        code=get_4bit_type("nf4", device=packed.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    dense: Tensor = dequantize_4bit(packed.reshape(-1, 1), state)
    return dense.view(outputs, inputs)
