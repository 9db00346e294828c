"""The least time that a decode step can take, from the bytes it must read and its operations. No torch.

The floor of a part is the larger of two times: its bytes over the memory's bandwidth, and its operations over
the rate of bf16 products. A step's floor is the sum over its parts. The bytes are those that must be read
once: weights with their scales, the output head, the rank rows of every adapter in the step, all keys and
values. Activations are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WEIGHT_BYTES = {
    "bf16": 2.0,
    "nf4, scales in 8 bits": 0.5 + 1 / 64 + 4 / (64 * 256),
    "nf4, scales in bf16": 0.5 + 2 / 64,
    "nf4, scales in float32": 0.5 + 4 / 64,
    "nf4, made bf16 in every step": 0.5 + 4 / 64 + 2 + 2,
}
"""Bytes that a step moves for each weight. NF4 has one scale for 64 weights. With double quantisation a scale
has 8 bits, and 256 of them share a float32: 4.127 bits a weight in all. Weights that are dequantised to bf16
first are written and read again."""

_BF16 = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes per second, reads plus writes, and bf16 operations per second."""

    bandwidth: float
    rate: float


DEVICES = {
    "h100": Machine(3.35e12, 989e12),
    "h200": Machine(4.8e12, 989e12),
    "a100": Machine(2.039e12, 312e12),
    "l4": Machine(0.3e12, 121e12),
    "4090": Machine(1.008e12, 165e12),
}
"""From the makers' data sheets: SXM and 80 GB where there are several, dense bf16 with float32 sums."""


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a part of a step must do."""

    nbytes: float = 0.0
    operations: float = 0.0

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.nbytes / machine.bandwidth, self.operations / machine.rate)


@dataclass(frozen=True, slots=True)
class Stack:
    """The sizes of a decoder that a step's work depends on.

    Attributes:
        layers: the number of blocks.
        linears: (in_features, out_features) of every linear in all blocks.
        head: weights of the output head.
        kv_width: elements that one token adds to the keys and values of all blocks.
        heads_per_kv_head: query heads that share a key.
    """

    layers: int
    linears: Sequence[tuple[int, int]]
    head: int
    kv_width: int
    heads_per_kv_head: int

    @property
    def weights(self) -> int:
        """Of all linears."""
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def row_width(self) -> int:
        """Elements of one rank row of A and of B at every linear."""
        return sum(inputs + outputs for inputs, outputs in self.linears)


@dataclass(frozen=True, slots=True)
class Step:
    """The contents of a decode step.

    Attributes:
        sequences: their number; each computes one token.
        context: tokens that each attends to.
        read_ranks: the sum of the ranks of the step's distinct adapters; each is read once.
        used_ranks: the sum over the sequences of their adapter's rank; each is multiplied with.
    """

    sequences: int
    context: float
    read_ranks: int = 0
    used_ranks: int = 0


def llama_stack(fields: Mapping[str, Any]) -> Stack:
    """From the fields of transformers' ``LlamaConfig``."""
    hidden, inner, layers = (
        fields[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, kv_heads, dim = (
        fields[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    block = [
        (hidden, heads * dim), (hidden, kv_heads * dim), (hidden, kv_heads * dim), (heads * dim, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip
    return Stack(
        layers, block * layers, hidden * fields["vocab_size"], 2 * kv_heads * dim * layers, heads // kv_heads
    )


def works(
    stack: Stack, step: Step, weight_bytes: float, head_bytes: float = WEIGHT_BYTES["bf16"]
) -> dict[str, Work]:
    """By part, the least that one decode step must read and compute.

    Args:
        weight_bytes, head_bytes: bytes of a weight of a linear, and of the output head.
    """
    kv = step.sequences * step.context * stack.kv_width
    return {
        "linears": Work(weight_bytes * stack.weights, 2 * step.sequences * stack.weights),
        "lora": Work(_BF16 * step.read_ranks * stack.row_width, 2 * step.used_ranks * stack.row_width),
        "attention": Work(_BF16 * kv, 2 * kv * stack.heads_per_kv_head),
        "head": Work(head_bytes * stack.head, 2 * step.sequences * stack.head),
    }


def floor(parts: Mapping[str, Work], machine: Machine) -> float:
    """Seconds of a whole step."""
    return sum(work.floor(machine) for work in parts.values())


def launches(stack: Stack, adapted: bool) -> int:
    """Kernels that a fused step on a GPU launches (``server/engine/model/cuda/model.py``).

    Each block launches four products, two norms, rotary embedding with the KV store, attention and the
    gated activation. Adapters add two launches to each product. Then come embedding, last norm, head,
    float32, and two for sampling. Each product counts as one launch, although some NF4 products take two
    (``products.py``).
    """
    return stack.layers * (9 + (8 if adapted else 0)) + 6
