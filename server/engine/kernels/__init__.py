"""The small operations of a Llama-like block, on a step's flattened tokens, in several backends.

    fused_add_rms_norm: x = x + delta, or x + RMSNorm(delta); then RMSNorm(x), where
                        RMSNorm(x) = x / sqrt(mean(x²) + eps) * weight
    rope_and_cache:     q, k = rotate(q), rotate(k), or of the RMSNorm of each head, where
                        rotate(x) = x * cos + rotate_half(x) * sin and rotate_half((a, b)) = (-b, a);
                        pages[new_slots] = k, v
    act_and_mul:        act(gate) * up

Activations are contiguous bf16, fp16 or float32. Arithmetic is in float32 and rounded once to their dtype. An
addition to x is also rounded, before the next norm reads x. Norm weights are float32 and include what a model
adds to them (Gemma's 1 + weight). ``reference.py`` is the specification.

On a GPU each operation is one launch, whose grid depends on its tensors' shapes alone. Nothing waits for the
device, so all of them may run in a CUDA graph. The first call compiles, so it must run outside a graph.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BlockOps(Protocol):
    """See the module's docstring. n is the number of tokens of the step."""

    def fused_add_rms_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, delta_weight: Tensor | None = None
    ) -> Tensor:
        """Add delta to x in place; return the norm of the new x in a new tensor.

        Args:
            x, delta: [n, hidden]. Without a delta x stays as it is.
            weight: [hidden].
            delta_weight: [hidden], the weight of a norm that delta passes first ("post" norms of Gemma2 and
                Gemma3).
        """

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        new_slots: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Apply the rotary embedding to q and k, and write k and v to the pages.

        Args:
            qkv: [n, (heads + 2 * kv_heads) * dim], q, k and v side by side, as one projection makes them.
            cos, sin: float32 [positions, rotary_dim], as transformers' rotary embedding makes them. The first
                rotary_dim dimensions of a head are rotated: all of them, except in some Phi-3.
            positions: int64 [n], the rows of cos and sin to use.
            new_slots: int64 [n], block * block_size + offset of each token.
            key_pages, value_pages: [blocks, block_size, kv_heads, dim].
            q_norm, k_norm: float32 [dim], both or neither; norms of each head of q and k, applied first
                (Qwen3, Gemma3).
            eps: the epsilon of these norms.

        Returns:
            q [n, heads, dim], a view of qkv, rotated in place. The values of a head and the heads of a token
            are contiguous, as attention kernels require. The k and v in qkv are unchanged.
        """

    def act_and_mul(self, gate_up: Tensor, gelu: bool) -> Tensor:
        """act(gate) * up [n, m] of gate_up [n, 2 * m]; act is SiLU, or GELU in its tanh form."""


def choose(device: torch.device) -> BlockOps:
    """The backend for this device, chosen once when the model is built."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from server.engine.kernels import triton

        return triton
    from server.engine.kernels import reference

    return reference
