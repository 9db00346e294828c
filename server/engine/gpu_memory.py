"""Measures a CUDA device's memory, and how much a step takes by running one."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from server.engine.memory import Meter
from server.engine.model import StepModel
from server.engine.model.made_up import made_up_prompt
from server.engine.sequence import Chunk


class GpuMeter:
    """See ``Meter``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total: int = torch.cuda.mem_get_info(device)[1]

    def free(self) -> int:
        torch.cuda.synchronize(self._device)
        free: int = torch.cuda.mem_get_info(self._device)[0]
        return free

    def ours(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def release(self) -> None:
        torch.cuda.empty_cache()


def step_bytes(
    model: StepModel, chunks: SequenceOf[Chunk], num_blocks: int, block_size: int, meter: Meter
) -> int:
    """The bytes that computing ``chunks`` takes, with ``num_blocks`` KV blocks allocated meanwhile."""
    model.allocate(num_blocks, block_size)
    meter.release()
    before = meter.free()
    model(chunks)
    taken = before - meter.free()
    model.allocate(1, block_size)
    meter.release()
    return taken


def largest_step(
    config: Any, max_tokens: int, max_seqs: int, longest: int, block_size: int
) -> tuple[list[Chunk], int]:
    """The step that takes the most memory: the end of the longest prompt, with as many answers as allowed.

    All sequences use an adapter, so the memory of the LoRA kernels counts too.

    Args:
        config: the text model's config.
        longest: tokens of the prompt. The memory of some attention backends grows with it.

    Returns:
        The chunks, and the number of KV blocks that they need.
    """
    prompt = made_up_prompt(config, longest, block_size, slot=0)
    length = min(max_tokens - (max_seqs - 1), prompt.length)
    answers = [made_up_prompt(config, 1, block_size, slot=0) for _ in range(max_seqs - 1)]
    return [*answers, Chunk(prompt.sequence, prompt.length - length, length)], -(-prompt.length // block_size)
