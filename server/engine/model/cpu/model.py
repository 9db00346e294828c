"""Llama-like models in one native call for each step (``kernels/cpu/src/stack.h``), on NF4 on a CPU.

The weights stay as bitsandbytes packed them. A request's logits are bit-identical alone, in any batch, beside
any adapters, chunked, preempted or from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from ctypes import addressof, byref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.base.context import own_length
from adapters.kernels.cpu import isa, library
from adapters.kernels.cpu.structs import STACK_PARTS, Scratch, StackCall
from adapters.pool.rank_pool import RankPool
from adapters.pool.site_pool import IntArray
from server.engine.attention.native_paged import NativePaged, NativePages
from server.engine.attention.native_tokens import NativeTokens
from server.engine.model.cpu.head import CpuHead
from server.engine.model.cpu.weights import CpuWeights, is_4bit, pack_head
from server.engine.model.llama_like import (
    ACTIVATIONS,
    activation_of,
    angle_bytes,
    check_llama_like,
    decoder_of,
    products_of,
    rotary_angles,
    rotary_size,
    text_config_of,
)
from server.engine.model.steps import flatten, lora_segments
from server.engine.model.transformers_model import TransformersModel
from server.engine.sequence import Chunk
from server.engine.transfer import resolve
from server.engine.unsupported import Unsupported


def check_cpu_model(unfused: TransformersModel, block_size: int) -> Unsupported | None:
    """Why this model cannot run fused here, or None if it can."""
    model: Any = unfused.model
    if unfused.device.type != "cpu" or library() is None or isa() != "avx512bf16":
        return Unsupported("the fused step needs a CPU with AVX512-BF16 and the native kernels")
    if (unsupported := check_llama_like(model)) is not None:
        return unsupported
    if not NativePaged.fits(unfused.shapes, block_size):
        return Unsupported("head dimension and block size must be multiples of 16")
    paths = [path for paths in products_of(model).values() for path in paths]
    linears = (layer.get_submodule(path).base for layer in decoder_of(model).layers for path in paths)
    if not all(is_4bit(linear) for linear in linears):
        return Unsupported("its linears are not packed NF4")
    return None


class CpuModel:
    """See ``StepModel``.

    Args:
        unfused: the same model as transformers runs it. Weights, shapes and rotary angles are taken from it.
        pool: the adapters' rank rows.
        max_tokens: most tokens of a step.

    Attributes:
        nanoseconds: time spent so far in each of ``STACK_PARTS``; never decreases.
        head: the output head.
        heads_per_kv_head: query heads that share a KV head.
    """

    name = "fused"
    attention_name = NativePaged.name

    def __init__(self, unfused: TransformersModel, pool: RankPool, max_tokens: int) -> None:
        loaded = library()
        assert loaded is not None
        self._library = loaded
        self._model: Any = unfused.model
        self._decoder = decoder_of(unfused.model)
        self._config: Any = text_config_of(unfused.model)
        self.shapes = unfused.shapes
        self.bytes_a_position = angle_bytes(unfused.model)
        self.fallbacks: list[str] = []
        self._lora = unfused.lora
        self._weights = CpuWeights(unfused.model, pool, unfused.specs)
        self.head = CpuHead(unfused, self._weights, loaded)
        self._tokens: NativeTokens | None = None
        self._pages: NativePages | None = None
        self._angles: list[tuple[Tensor, Tensor]] = []
        self._max_tokens = max_tokens
        self._scratch = self._make_scratch()
        self.nanoseconds = np.zeros(len(STACK_PARTS), np.int64)
        first = self._weights.blocks[0]
        spec = unfused.specs[0]
        self._call = StackCall(
            blocks=addressof(self._weights.blocks),
            n_blocks=len(self._weights.blocks),
            hidden=self._config.hidden_size,
            heads=first.o.parts[0].inputs // self.shapes[0].key_dim,
            head_dim=self.shapes[0].key_dim,
            intermediate=first.down.parts[0].inputs,
            rotary_dim=rotary_size(unfused.model),
            eps=self._config.rms_norm_eps,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            gelu=ACTIVATIONS[activation_of(unfused.model)],
            codebook=self._weights.codebook.data_ptr(),
            scratch=Scratch(**{name: tensor.data_ptr() for name, tensor in self._scratch.items()}),
            nanoseconds=self.nanoseconds.ctypes.data,
        )
        self.heads_per_kv_head = self._call.heads // self.shapes[0].kv_heads

    @property
    def head_size(self) -> int:
        """Weights of the output head."""
        return self.head.size

    def allocate(self, num_blocks: int, block_size: int) -> None:
        positions = num_blocks * block_size
        positions = min(positions, own_length(self._config) or positions)
        self._tokens = NativeTokens(block_size)
        self._pages = NativePages(self.shapes, num_blocks * block_size)
        for layer, pages in self._pages.layers.items():
            self._weights.blocks[layer].pages = pages
        self._angles = rotary_angles(self._model, positions)
        for block, angles in zip(self._weights.blocks, self._angles, strict=True):
            block.cosines, block.sines = (table.data_ptr() for table in angles)

    def warm_up(self) -> None:
        """Do nothing: the kernels were compiled when the package was built."""

    @torch.inference_mode()
    def __call__(
        self, chunks: SequenceOf[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor:
        assert self._tokens is not None
        tokens, _, last = flatten(chunks)
        tokens = resolve(tokens, prev_tokens)
        self._check_extents(chunks, len(tokens))
        self._tokens.begin(chunks)
        rows = last if rows is None else rows
        self._lora.begin(len(tokens), lora_segments(chunks), rows)
        segments = np.array(self._lora.segments, np.int64).reshape(-1, 3)
        norm_slots = self._norm_slots(len(tokens))
        x = self._decoder.embed_tokens(tokens)
        call = self._call
        call.x, call.tokens = x.data_ptr(), addressof(self._tokens.struct)
        call.segments, call.n_segments = segments.ctypes.data, len(segments)
        call.norm_slots = None if norm_slots is None else norm_slots.ctypes.data
        self._library.manylora_stack(byref(call))
        return self.head(x, rows)

    def adopt(self, pool: RankPool) -> None:
        """Make the pool store adapters' own heads and norms in the native kernels' layout."""
        pool.extras.pack_head, pool.extras.norm_weight = pack_head, self._weights.norm_weight

    def _check_extents(self, chunks: SequenceOf[Chunk], count: int) -> None:
        """Raises ValueError if the kernel would write outside its scratch or read outside its angles."""
        longest, positions = max(chunk.stop for chunk in chunks), len(self._angles[0][0])
        if count > self._max_tokens or longest > positions:
            raise ValueError(
                f"a step of {count} tokens with a sequence of {longest} tokens; there is room for "
                f"{self._max_tokens} tokens and {positions} positions"
            )

    def _norm_slots(self, count: int) -> IntArray | None:
        """By token, the slot of the adapter whose norms apply; None if no adapter in the step has norms."""
        extras_segments = [part for part in self._lora.extras_segments if part.extras.norms]
        if not extras_segments:
            return None
        slots = np.full(count, -1, np.int64)
        for slot, start, stop, _ in extras_segments:
            slots[start:stop] = slot
        return slots

    def _make_scratch(self) -> dict[str, Tensor]:
        block = self._weights.blocks[0]
        hidden = self._config.hidden_size
        widths = {
            "normed": hidden,
            "qkv": sum(part.outputs for part in block.qkv.parts[: block.qkv.n]),
            "attended": block.o.parts[0].inputs,
            "gate_up": sum(part.outputs for part in block.gate_up.parts[: block.gate_up.n]),
            "delta": hidden,
        }
        return {
            name: torch.empty(self._max_tokens, width, dtype=torch.bfloat16) for name, width in widths.items()
        }
