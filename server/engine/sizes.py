"""The sizes that depend on the device and the loaded model: of a step, the rank pool, the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adapters.base import LoadedBase
from adapters.base.context import own_length
from adapters.pool.rank_pool import RankPool, row_bytes
from server.config import ConfigError, EngineConfig, ServerConfig
from server.engine.attention.choice import preferred_block_size
from server.engine.gpu_memory import GpuMeter, largest_step, step_bytes
from server.engine.memory import (
    BYTES_A_LOGIT,
    GRAPHS,
    KV_CACHE_ON_CPU,
    LATER,
    LORAS_ON_CPU,
    RANK,
    Meter,
    Share,
    gib,
    left_for_kv,
    rows_that_fit,
    usable,
)
from server.engine.model import StepModel

log = logging.getLogger("manylora.engine")

_STEP_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of a step, by device. More do not speed up prefill, and delay every sequence's next token."""


class Sizes:
    """The values for "auto" in ``config``, for this base on its device. Call the methods in their order.

    Args:
        meter: measures the device's memory; None = a ``GpuMeter`` on a GPU, nothing on a CPU.

    Attributes:
        block_size: tokens of a KV block.
        step_tokens: most tokens of a step.
    """

    def __init__(self, config: ServerConfig, base: LoadedBase, meter: Meter | None = None) -> None:
        self._config, self._base = config, base
        device = base.model.device
        self._meter = GpuMeter(device) if meter is None and device.type == "cuda" else meter
        engine = config.engine
        self.step_tokens = engine.max_num_batched_tokens or max(
            _STEP_TOKENS[device.type], engine.max_num_seqs
        )
        self.block_size = engine.block_size or preferred_block_size(
            base.model.config.get_text_config(), device, base.model.dtype
        )

    def pool_rows(self) -> int:
        """The number of rank rows. Call it when only the base is loaded."""
        adapters, answers = self._config.adapters, self._config.engine.max_num_seqs
        if adapters.pool_rows is not None:
            return adapters.pool_rows
        if self._meter is None:
            return max(LORAS_ON_CPU * RANK, adapters.max_lora_rank)
        self._meter.release()
        total = self._meter.total
        room = usable(total, self._config.engine.gpu_memory_utilization) - (total - self._meter.free())
        bytes_a_row = row_bytes(self._base.layout.sites, self._base.model.dtype)
        return rows_that_fit(answers, adapters.max_lora_rank, bytes_a_row, max(room, 0))

    def kv_blocks(self, model: StepModel, pool: RankPool) -> int:
        """The number of KV blocks. Call it when everything else that stays is allocated.

        Raises:
            ConfigError: too little memory is left.
        """
        engine = self._config.engine
        block = self.block_size * self._token_bytes(model)
        memory = engine.kv_cache_memory
        if memory is None:
            memory = KV_CACHE_ON_CPU if self._meter is None else self._left(model, pool, self._meter)
        if memory < block:
            raise ConfigError(
                f"--kv-cache-memory {memory}: one block of this model takes {block} bytes; "
                "give it at least that, better a thousand times as much"
            )
        return memory // block

    def _left(self, model: StepModel, pool: RankPool, meter: Meter) -> int:
        engine, token = self._config.engine, self._token_bytes(model)
        meter.release()
        taken, ours, rows = meter.total - meter.free(), meter.ours(), pool.bytes_total
        shares = [
            Share("the base", ours - rows, "--base, --quantization"),
            Share("rank rows of adapters", rows, "--max-loras, --lora-pool-rows"),
            Share("other processes and CUDA itself", taken - ours),
            Share(
                "the adapters' norms, embeddings and heads",
                self._config.adapters.extra_memory,
                "--lora-extra-memory",
            ),
            Share("what CUDA allocates later", LATER),
        ]
        if not engine.enforce_eager:
            shares.append(Share("CUDA graphs", GRAPHS, "--enforce-eager"))
        room = usable(meter.total, engine.gpu_memory_utilization) - sum(share.nbytes for share in shares)
        if model.bytes_a_position:
            positions = min(own_length(self._base.model.config.get_text_config()) or room, room // token)
            tables = model.bytes_a_position * max(positions, 0)
            shares.append(Share("the model's tables by position", tables))
        step = self._step_bytes(model, max(room // 2 // token, self.step_tokens), meter)
        shares.append(Share("a step", step, "--max-num-batched-tokens, --max-num-seqs"))
        left = left_for_kv(meter.total, engine.gpu_memory_utilization, shares, self.step_tokens * token)
        log.info(
            "GPU memory: %s of %s may be used: %s; %s for keys and values",
            gib(usable(meter.total, engine.gpu_memory_utilization)), gib(meter.total),
            "; ".join(map(str, shares)), gib(left),
        )  # fmt: skip
        return left

    def _step_bytes(self, model: StepModel, most_tokens: int, meter: Meter) -> int:
        """The bytes that the largest step takes, with sampling. ``most_tokens`` of KV fit meanwhile."""
        engine = self._config.engine
        config: Any = self._base.model.config.get_text_config()
        longest = min(most_tokens, engine.max_model_len or own_length(config) or most_tokens)
        step, blocks = largest_step(config, self.step_tokens, engine.max_num_seqs, longest, self.block_size)
        with out_of_memory_names("--max-num-batched-tokens", f"a step of {self.step_tokens} tokens"):
            taken = step_bytes(model, step, blocks, self.block_size, meter)
        logits: int = engine.max_num_seqs * config.vocab_size
        return taken + logits * BYTES_A_LOGIT

    def _token_bytes(self, model: StepModel) -> int:
        return sum(shape.bytes_per_token(self._base.model.dtype) for shape in model.shapes.values())


def max_model_len(config: EngineConfig, model_config: Any, capacity: int) -> int:
    """The configured length, or the model's own limited by the KV cache. Raises ``ConfigError``."""
    own = own_length(model_config.get_text_config()) or capacity
    wanted = config.max_model_len
    if wanted is None:
        return min(own, capacity)
    if wanted > own:
        raise ConfigError(f"--max-model-len {wanted}: the model itself handles {own} tokens; ask for no more")
    if wanted > capacity:
        raise ConfigError(
            f"--max-model-len {wanted}: the KV cache holds {capacity} tokens; "
            f"raise --kv-cache-memory or set --max-model-len to {capacity} or less"
        )
    return wanted


@contextmanager
def out_of_memory_names(flag: str, what: str) -> Iterator[None]:
    """Turn running out of GPU memory at the start into a ``ConfigError`` that names ``flag``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f"{flag}: the GPU has too little memory for {what}; give it less ({first_line})"
        ) from error
