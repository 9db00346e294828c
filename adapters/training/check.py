"""All that can be known of a run before the base's weights are loaded, for a job that is only asked for.

``run.py`` finds the same in the same functions before it loads them; only rows are looked at more quickly
here: those whose size in bytes says that they fit are not made into tokens.
"""

from __future__ import annotations

from dataclasses import replace

from adapters.base import prepare_base
from adapters.base.outline import BaseOutline, outline_of
from adapters.text.renderer import ChatRenderer, base_renderer
from adapters.training.dataset import Dataset, read_dataset
from adapters.training.encode import encode_dataset
from adapters.training.fit import check_questions, doubtful_rows, kinds_of_rows
from adapters.training.overlap import repetitions
from adapters.training.recipe import TrainConfig
from adapters.training.schedule import steps_for
from adapters.training.servable import Serving, check_servable


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
    renderer = base_renderer(outline.tokenizer, config.allow_special_tokens)
    warnings = repetitions(data, held_out)
    for one in (data, held_out):
        if one is not None:
            warnings += _check_rows(one, config, renderer, outline)
    if serving is not None and held_out is not None and renderer is not None:
        check_questions(held_out, renderer, outline.context, serving.is_asked)
    if not config.packing:  # how many packs there are only tokens can tell
        steps_for(len(data.rows), config)
    return warnings


def _check_rows(
    data: Dataset, config: TrainConfig, renderer: ChatRenderer | None, outline: BaseOutline
) -> list[str]:
    longest = min(config.max_seq_len, outline.context)
    rows = {row.line: row for row in (*kinds_of_rows(data), *doubtful_rows(data, longest))}
    doubtful = replace(data, rows=[rows[line] for line in sorted(rows)])
    cut = encode_dataset(doubtful, renderer, outline.eos, longest).truncated
    return [f"{data.path.name}: examples over {longest} tokens, which are cut there: {cut}."] if cut else []
