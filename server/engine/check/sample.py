"""Two made-up requests, and the steps that compute them: in chunks, beside each other, then decoding."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from typing import Any

from server.engine.attention import AttentionSpec
from server.engine.kv_cache import BlockTable, chain_root
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk
from server.engine.sequence import Sequence as EngineSequence

_SHORT, _LONG = 27, 61
"""Tokens of the two requests. Neither is a multiple of a block."""

_DECODED = 3
"""How many of them are computed one at a time."""

_LARGEST_WINDOW = 128
"""The long request is longer than sliding windows up to this size. Longer requests would cost too much."""

_WORDS = 4096
"""Token ids are taken from the first ones of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Request:
    """Made-up tokens and the KV blocks that they may use.

    Attributes:
        slot: the adapter's slot; -1 = the base.
    """

    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    slot: int = -1


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, stop) of the request with that index."""

    request: int
    start: int
    stop: int


Step = list[Part]


def made_up_prompts(config: Any, specs: Collection[AttentionSpec], longest: int) -> list[tuple[int, ...]]:
    """The tokens of a short and of a long request.

    Args:
        config: the model's config. The special tokens that it names are not used.
        specs: how the layers attend.
        longest: most tokens of a sequence.
    """
    windows = [spec.window for spec in specs if spec.window is not None and spec.window <= _LARGEST_WINDOW]
    lengths = _SHORT, max([_LONG, *(window + _SHORT for window in windows)])
    words = _plain_words(config.get_text_config())
    chance = random.Random(0)
    return [tuple(chance.choices(words, k=min(length, longest))) for length in lengths]


def requests_for(prompts: Sequence[tuple[int, ...]], num_blocks: int, block_size: int) -> list[Request]:
    """The prompts, shortened to the ``num_blocks`` KV blocks that there are. No sequence may own one.

    Their blocks are scattered, so that reading a wrong block shows.
    """
    limit = num_blocks // len(prompts) * block_size
    prompts = [prompt[:limit] for prompt in prompts]
    counts = [-(-len(prompt) // block_size) for prompt in prompts]
    blocks = iter(random.Random(0).sample(range(sum(counts)), sum(counts)))
    return [
        Request(prompt, tuple(islice(blocks, count))) for prompt, count in zip(prompts, counts, strict=True)
    ]


def mixed_steps(requests: Sequence[Request], max_tokens: int) -> list[Step]:
    """Both requests in chunks, each chunk beside one of the other request, then both decoding.

    ``max_tokens``: most tokens of a step.
    """
    most = max(max_tokens // len(requests), 1)
    cut = [list(_cut(i, len(one.tokens), i + 2, most)) for i, one in enumerate(requests)]
    steps: list[Step] = []
    for number, parts in enumerate(zip_longest(*cut)):
        step = [part for part in parts if part is not None]
        steps += [step[::-1] if number % 2 else step] if max_tokens > 1 else [[part] for part in step]
    return steps


def lone_steps(requests: Sequence[Request], max_tokens: int) -> list[Step]:
    """Each request alone, its whole prompt in one step if ``max_tokens`` allows it."""
    return [[part] for i, one in enumerate(requests) for part in _cut(i, len(one.tokens), 1, max_tokens, 0)]


def lone_chunked_steps(requests: Sequence[Request], max_tokens: int) -> list[Step]:
    """Each request alone, in chunks, then decoding."""
    return [[part] for i, one in enumerate(requests) for part in _cut(i, len(one.tokens), 3, max_tokens)]


def chunks_of(step: Step, requests: Sequence[Request]) -> list[Chunk]:
    """The step as models take it. As in decoding, a sequence has no tokens after those of the step."""
    return [_chunk(requests[part.request], part) for part in step]


def _chunk(request: Request, part: Part) -> Chunk:
    known = request.tokens[: part.stop]
    sequence = EngineSequence("check", 0, known, None, SamplingParams(max_tokens=1), 0, 0, frozenset())
    sequence.slot = request.slot
    sequence.table = BlockTable(chain_root(None))
    sequence.table.blocks = list(request.blocks)
    return Chunk(sequence, part.start, part.stop - part.start)


def _cut(request: int, length: int, parts: int, most: int, decoded: int = _DECODED) -> Iterator[Part]:
    """About ``parts`` parts of at most ``most`` tokens, and the last tokens one by one."""
    prompt = max(length - decoded, 1)
    size = min(-(-prompt // parts), most)
    bounds = [*range(0, prompt, size), *range(prompt, length + 1)]
    return (Part(request, start, stop) for start, stop in pairwise(bounds))


def _plain_words(text_config: Any) -> list[int]:
    special: set[Any] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(text_config, name, None)
        special |= set(value if isinstance(value, list | tuple) else [value])
    return [word for word in range(min(text_config.vocab_size, _WORDS)) if word not in special]
