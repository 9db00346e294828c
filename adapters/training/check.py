"""All that can be known of a run before the base's weights are loaded, for a job that is only asked for.

``run.py`` finds the same in the same functions before it loads them; only rows are looked at more quickly
here: those whose size in bytes says that they fit are not made into tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from adapters.base import prepare_base
from adapters.base.outline import BaseOutline, outline_of
from adapters.text.renderer import base_renderer
from adapters.training.dataset import Dataset, Row, read_dataset
from adapters.training.encode import encode_dataset
from adapters.training.overlap import repetitions
from adapters.training.recipe import TrainConfig
from adapters.training.schedule import steps_for
from adapters.training.servable import Serving, check_servable

_BYTES_OF_TEMPLATE, _BYTES_OF_MESSAGE = 2048, 64
"""More than a chat template writes around a conversation, and around one message."""


def check_run(config: TrainConfig, serving: Serving | None = None) -> list[str]:
    """Warnings about what may be trained all the same.

    Raises:
        DatasetInvalid: rows that cannot be learnt from.
        RecipeInvalid: a recipe that the base does not allow, or whose adapter ``serving`` would refuse.
        BaseModelError: the base cannot be had.
    """
    data = read_dataset(config.data)
    held_out = read_dataset(config.eval_data) if config.eval_data else None
    prepared = prepare_base(config.base, config.home, config.quantization, config.head_quantization, False)
    outline = outline_of(prepared)
    check_servable(config, outline.layout, serving)
    warnings = repetitions(data, held_out)
    for one in (data, held_out):
        if one is not None:
            warnings += _check_rows(one, config, outline)
    if not config.packing:  # how many packs there are only tokens can tell
        steps_for(len(data.rows), config)
    return warnings


def _check_rows(data: Dataset, config: TrainConfig, outline: BaseOutline) -> list[str]:
    longest = min(config.max_seq_len, outline.context)
    doubtful = replace(data, rows=list(_doubtful(data, longest)))
    renderer = base_renderer(outline.tokenizer, config.allow_special_tokens)
    cut = encode_dataset(doubtful, renderer, outline.eos, longest).truncated
    return (
        [f"{data.path.name}: {cut} examples have over {longest} tokens; they are cut there."] if cut else []
    )


def _doubtful(data: Dataset, longest: int) -> Iterator[Row]:
    """Rows that may have too many tokens (each has a byte at least), and one of each order of roles."""
    orders: set[tuple[str, ...]] = set()
    for row in data.rows:
        order = tuple(message["role"] for message in row.messages)
        texts = [text for message in row.messages for text in message.values()]
        size = sum(len(text.encode()) for text in texts) + _BYTES_OF_MESSAGE * len(row.messages)
        if order not in orders or size + _BYTES_OF_TEMPLATE > longest:
            orders.add(order)
            yield row
