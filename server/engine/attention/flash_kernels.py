"""FlashAttention-2 behind one interface (``PagedKernel``), for two builds of it.

Both builds have in common, according to their sources (flash-attn 2.8 ``csrc/flash_attn/flash_api.cpp``,
``src/mask.h``; PyTorch 2.13 ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``):

- a page holds a multiple of 256 tokens; block tables, lengths and running sums are int32;
- the causal mask is aligned bottom right; a window (left, right) reaches from ``left`` positions before the
  query to ``right`` positions after it, both included;
- a single query sees everything, so "causal" has no effect then. Only without a window do they treat the
  query heads that share a KV head as its query rows, so that its keys are read once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor

from server.engine.attention import AttentionSpec
from server.engine.attention.flash_metadata import FlashMetadata

PAGE = 256
"""A page holds a multiple of this number of tokens."""

_EVERYTHING = (-1, -1)


class FlashAttn:
    """The flash-attn package. See ``PagedKernel``.

    Args:
        varlen, with_kvcache: its ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache``.
    """

    def __init__(self, varlen: Callable[..., Any], with_kvcache: Callable[..., Any], version: str) -> None:
        self.name = f"flash-attn {version}"
        self._varlen, self._with_kvcache = varlen, with_kvcache

    @classmethod
    def load(cls) -> FlashAttn:
        """Raises ImportError if it is not installed, cannot be loaded or is too old."""
        import flash_attn

        varlen, with_kvcache = flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache
        _require(varlen, "block_table", "softcap")
        _require(with_kvcache, "block_table", "softcap")
        return cls(varlen, with_kvcache, flash_attn.__version__)

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        how: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "causal": True,
            "window_size": _EVERYTHING if spec.window is None else (spec.window - 1, 0),
            "softcap": spec.softcap or 0.0,
            "block_table": metadata.tables,
        }
        out: Tensor
        if metadata.max_query == 1:
            out = self._with_kvcache(q.unsqueeze(1), keys, values, cache_seqlens=metadata.lengths, **how)
            return out.squeeze(1)
        sums = metadata.query_starts, metadata.kv_starts
        out = self._varlen(q, keys, values, *sums, metadata.max_query, metadata.max_length, **how)
        return out


class TorchVarlen:
    """PyTorch's own build, if it supports block tables (2.13 does, 2.11 does not). See ``PagedKernel``.

    Args:
        varlen: ``torch.nn.attention.varlen.varlen_attn``.
    """

    name = "torch FlashAttention-2 (varlen)"

    def __init__(self, varlen: Callable[..., Any]) -> None:
        self._varlen = varlen

    @classmethod
    def load(cls) -> TorchVarlen:
        """Raises ImportError if this torch has none, or one without block tables."""
        from torch.nn.attention.varlen import varlen_attn

        _require(varlen_attn, "block_table", "seqused_k", "enable_gqa")
        logging.getLogger(varlen_attn.__module__).setLevel(logging.WARNING)  # it logs every call
        return cls(varlen_attn)

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        causal = _EVERYTHING if metadata.max_query == 1 else (-1, 0)
        out: Tensor = self._varlen(
            q,
            keys,
            values,
            metadata.query_starts,
            metadata.kv_starts,
            metadata.max_query,
            metadata.max_length,
            scale=spec.scale,
            window_size=causal if spec.window is None else (spec.window - 1, 0),
            enable_gqa=True,
            seqused_k=metadata.lengths,
            block_table=metadata.tables,
        )
        return out


def _require(function: Callable[..., Any], *parameters: str) -> None:
    missing = [name for name in parameters if name not in signature(function).parameters]
    if missing:
        raise ImportError(f"{function.__name__} has no {missing[0]}")
