"""The final norm and the output head in native calls (``adapters/kernels/cpu/src/head.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import byref

import torch
from torch import Tensor

from adapters.kernels import Segment
from adapters.kernels.cpu.structs import HeadCall
from adapters.layers.lora_state import ExtrasSegment
from adapters.pool.extras_pool import ResidentEmbeddingOrHead
from server.engine.model.cpu.weights import CpuWeights, is_4bit
from server.engine.model.llama_like import decoder_name, text_config_of
from server.engine.model.transformers_model import TransformersModel


class CpuHead:
    """The output head. A row's logits are bit-identical whatever other rows there are.

    Args:
        unfused: the model. Its LoRA state says which rows belong to adapters with their own norm or head.
        weights: the weights of the same model.

    Attributes:
        size: the number of weights.
        is_4bit: whether they are NF4.
    """

    def __init__(self, unfused: TransformersModel, weights: CpuWeights, library: ctypes.CDLL) -> None:
        self._library = library
        self._weights = weights
        self._lora, self._kernel = unfused.lora, unfused.lora_kernel
        self._final_norm = f"{decoder_name(unfused.model)}.norm"
        self._eps: float = text_config_of(unfused.model).rms_norm_eps
        self._softcap: float = getattr(unfused.model.config, "final_logit_softcapping", None) or 0.0
        head = unfused.model.lm_head
        self._vocabulary: int = head.out_features
        self.size: int = head.in_features * head.out_features
        self.is_4bit = is_4bit(head.base)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """float32 logits [n, vocabulary] of the given rows of x [tokens, hidden]."""
        logits, _ = self._run(x, rows, self._weights.final_norm, self._weights.head, self._softcap)
        for segment in self._lora.extras_head_rows:
            if segment.extras.head is not None or self._final_norm in segment.extras.norms:
                logits[segment.start : segment.stop] = self._replaced(
                    x, rows[segment.start : segment.stop], segment
                )
        return logits

    def _replaced(self, x: Tensor, rows: Tensor, segment: ExtrasSegment) -> Tensor:
        norm, head = self._weights.final_norm, self._weights.head
        if self._final_norm in segment.extras.norms:
            norm = self._weights.norm_weight(segment.extras.norms[self._final_norm]["weight"])
        end = segment.extras.head
        if end is not None and end.matrix is not None:
            head = {"w": end.matrix.data_ptr()}
        changed = end is not None and end.pool is not None
        logits, normed = self._run(x, rows, norm, head, 0.0 if changed else self._softcap)
        return self._changed(logits, normed, end) if changed and end is not None else logits

    def _changed(self, logits: Tensor, normed: Tensor, end: ResidentEmbeddingOrHead) -> Tensor:
        """Apply the adapter's LoRA and its scale at the head; then the soft cap."""
        assert end.pool is not None
        added = torch.zeros(logits.shape, dtype=normed.dtype)
        self._kernel(added, normed, end.pool, [Segment(0, 0, len(normed))])
        scale = end.pool.adjustments[0].scale if end.pool.adjustments else None
        logits = added + (logits if scale is None else logits * scale)
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits

    def _run(
        self, x: Tensor, rows: Tensor, norm: Tensor, head: Mapping[str, int], softcap: float
    ) -> tuple[Tensor, Tensor]:
        """The logits, and the normed rows that they are computed from. ``head``: as ``CpuWeights.head``."""
        n, wanted = len(rows), rows.tolist()
        if n and not 0 <= min(wanted) <= max(wanted) < len(x):
            raise ValueError(f"the head is asked for rows outside the step's {len(x)} tokens")
        out = torch.empty(n, -(-self._vocabulary // 16) * 16)
        normed = torch.empty(n, x.shape[1], dtype=x.dtype)
        call = HeadCall(
            x=x.data_ptr(),
            rows=rows.data_ptr(),
            n=n,
            hidden=x.shape[1],
            vocabulary=self._vocabulary,
            norm=norm.data_ptr(),
            eps=self._eps,
            softcap=softcap,
            normed=normed.data_ptr(),
            out=out.data_ptr(),
            **head,
        )
        self._library.manylora_head(byref(call))
        return out[:, : self._vocabulary], normed
