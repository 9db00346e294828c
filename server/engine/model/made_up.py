"""Dummy steps: to compare two models, to warm one up, to measure the memory of a step."""

from __future__ import annotations

from typing import Any

from adapters.base.context import own_length
from server.engine.kv_cache import BlockTable, chain_root
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk, Sequence

_WARM_TOKENS = 256


def made_up_prompt(config: Any, length: int, block_size: int, slot: int = -1) -> Chunk:
    """A whole prompt in the first KV blocks. Use it only while no sequence owns them.

    Args:
        config: the model's config; its text model limits the length.
        slot: an adapter slot. A free slot has no rank rows, so the kernels run and add nothing.
    """
    text = config.get_text_config()
    length = min(length, own_length(text) or length)
    prompt = tuple((37 * i + 11) % text.vocab_size for i in range(length))
    sequence = Sequence("made-up", 0, prompt, None, SamplingParams(max_tokens=1), 0, 0, frozenset())
    sequence.slot = slot
    sequence.table = BlockTable(chain_root(None))
    sequence.table.blocks = list(range(-(-length // block_size)))
    return Chunk(sequence, 0, length)


def warming_steps(config: Any, num_blocks: int, block_size: int) -> list[list[Chunk]]:
    """A prompt, then one token, each with an adapter. Together they launch every kernel that steps use."""
    length = min(_WARM_TOKENS, num_blocks * block_size)
    prompt = made_up_prompt(config, length, block_size, slot=0)
    return [[prompt], [Chunk(prompt.sequence, prompt.length - 1, 1)]]
