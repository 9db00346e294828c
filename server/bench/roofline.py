"""The least that one decode step can take: bytes that must be read, operations that must be done. No torch.

The floor of a part is the larger of its bytes over the memory's bandwidth and its operations over the rate of
bf16 products; a step's floor is their sum. Bytes are what must be read once: weights with their scales, the
output head, the rows of every adapter in the step, all keys and values. Activations are left out.
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
"""Bytes that a step moves for one weight. NF4 has a scale for 64 weights, double quantisation one in 8 bits
and a float32 for 256 of those: 4.127 bits in all. What is made bf16 first is written and read again."""

_BF16 = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second (reading and writing counted), and bf16 operations a second."""

    bandwidth: float
    rate: float


DEVICES = {
    "h100": Machine(3.35e12, 989e12),
    "h200": Machine(4.8e12, 989e12),
    "a100": Machine(2.039e12, 312e12),
    "l4": Machine(0.3e12, 121e12),
    "4090": Machine(1.008e12, 165e12),
}
"""What the makers' data sheets promise (SXM, 80 GB where there are several; dense bf16 into float32)."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a part of one step must do at least."""

    nbytes: float = 0.0
    operations: float = 0.0

    def floor(self, machine: Machine) -> float:
        """Seconds."""
        return max(self.nbytes / machine.bandwidth, self.operations / machine.rate)


@dataclass(frozen=True, slots=True)
class Stack:
    """A decoder's sizes, as far as a step's work depends on them.

    Attributes:
        layers: how many blocks.
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
    """What a decode step is asked for.

    Attributes:
        sequences: each computes one token.
        context: tokens that each looks at.
        read_ranks: sum of the ranks of the distinct adapters in the step, which are read once.
        used_ranks: sum over the sequences of their adapter's rank, which is computed with.
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
        weight_bytes, head_bytes: of a linear's weight and of the output head's.
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
    """Kernels that a fused step on a GPU launches (``server/engine/model/cuda/model.py``), a product in one.

    By block: four products, two norms, rotary with the KV store, attention and the gated activation; each
    product's adapters take two more. Then embedding, last norm, head, float32, and two for sampling. An NF4
    product takes a second launch where the one that was chosen works in two (``products.py`` there).
    """
    return stack.layers * (9 + (8 if adapted else 0)) + 6
