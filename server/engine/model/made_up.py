"""Steps of nobody's: to compare two models, to warm one up, to see how much memory a step takes."""

from __future__ import annotations

from typing import Any

from server.engine.kv_cache import BlockTable, chain_root
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk, Sequence

_WARM_TOKENS = 256


def made_up_prompt(config: Any, length: int, block_size: int, slot: int = -1) -> Chunk:
    """A whole prompt in the first KV blocks; only while nobody owns them.

    Args:
        config: the model's; nothing gets longer than it allows.
        slot: an adapter's place. A free one has no rows, so that kernels run and add nothing.
    """
    length = min(length, config.max_position_embeddings)
    prompt = tuple((37 * i + 11) % config.vocab_size for i in range(length))
    sequence = Sequence("made-up", 0, prompt, None, SamplingParams(max_tokens=1), 0, 0, frozenset())
    sequence.slot = slot
    sequence.table = BlockTable(chain_root(None))
    sequence.table.blocks = list(range(-(-length // block_size)))
    return Chunk(sequence, 0, length)


def warming_steps(config: Any, num_blocks: int, block_size: int) -> list[list[Chunk]]:
    """A prompt, then a token, each under an adapter: together they launch every kernel that steps launch."""
    length = min(_WARM_TOKENS, num_blocks * block_size)
    prompt = made_up_prompt(config, length, block_size, slot=0)
    return [[prompt], [Chunk(prompt.sequence, prompt.length - 1, 1)]]
