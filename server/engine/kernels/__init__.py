"""The small operations of a Llama-like block, on a step's flattened tokens, several backends.

    fused_add_rms_norm:          x = x + delta, or x + RMSNorm(delta); then RMSNorm(x), where
                       RMSNorm(x) = x / sqrt(mean(x²) + eps) * weight
    rope_and_cache:  q, k = rotate(q), rotate(k), or of the RMSNorm of each head, where
                       rotate(x) = x * cos + rotate_half(x) * sin and rotate_half((a, b)) = (-b, a);
                       pages[new_slots] = k, v
    gated:             act(gate) * up

Activations are bf16, fp16 or float32, and contiguous; arithmetic is in float32, rounded once to their dtype
(and after each addition to x, which the next norm then sees rounded). Norms' weights are float32, with what
a model adds to them (Gemma's 1 + weight) already in them. ``reference.py`` is the specification.

On a GPU each is one launch, whose shape depends on its tensors' shapes alone: nothing waits for the device,
so all may run in a CUDA graph (once they ran outside one: the first call compiles).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BlockOps(Protocol):
    """See the module's docstring. n = tokens of the step."""

    def fused_add_rms_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, delta_weight: Tensor | None = None
    ) -> Tensor:
        """Add delta to x, in place; the new x's norm in a new tensor.

        Args:
            x, delta: [n, hidden]. Without a delta x stays as it is.
            weight: [hidden].
            delta_weight: [hidden], of the norm through which delta goes first (Gemma2's "post" norms).
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
        """Turn q and k by their positions; k and v go into the pages.

        Args:
            qkv: [n, (heads + 2 * kv_heads) * dim], q, k and v side by side, as one projection makes them.
            cos, sin: float32 [positions, dim], as transformers' rotary embedding makes them. All of a head is
                turned (as in Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma2; none of them turns a part).
            positions: int64 [n], rows of cos and sin.
            new_slots: int64 [n], block * block_size + offset of each token.
            key_pages, value_pages: [blocks, block_size, kv_heads, dim].
            q_norm, k_norm: float32 [dim], both or none; each head of q and k goes through them first (Qwen3).
            eps: of these norms.

        Returns:
            q [n, heads, dim], a view of qkv, where it is turned in place: a head's values and the heads of a
            token lie side by side, which is what attention kernels ask for. Of k and v, what qkv holds is
            as it was.
        """

    def act_and_mul(self, gate_up: Tensor, gelu: bool) -> Tensor:
        """act(gate) * up [n, m] of gate_up [n, 2 * m]; act is SiLU, or GELU by its tanh formula."""


def choose(device: torch.device) -> BlockOps:
    """The backend for this device, chosen once when the model is built."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from server.engine.kernels import triton

        return triton
    from server.engine.kernels import reference

    return reference
