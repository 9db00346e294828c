"""Checks a run before the base's weights are loaded, for a job that has only been requested.

``run.py`` makes the same checks with the same functions before it loads the weights. Here rows are checked
faster: rows that fit by their size in bytes are not tokenised.
"""

from __future__ import annotations

from dataclasses import replace

from adapters.base.outline import BaseOutline, outline_of
from adapters.text.renderer import ChatRenderer, base_renderer
from adapters.training.dataset import Dataset, read_dataset
from adapters.training.encode import encode_dataset
from adapters.training.fit import check_questions, one_row_per_role_order, rows_that_may_not_fit
from adapters.training.overlap import repetitions
from adapters.training.recipe import TrainConfig
from adapters.training.schedule import steps_for
from adapters.training.servable import Serving, check_servable, prepare_run_base


def check_run(config: TrainConfig, serving: Serving | None = None) -> list[str]:
    """Returns warnings, which do not prevent training.

    Raises:
        DatasetInvalid: there are rows that cannot be used.
        RecipeInvalid: the base does not allow the recipe, or ``serving`` would refuse its adapter.
        BaseModelError: the base is not available.
    """
    data = read_dataset(config.data)
    held_out = read_dataset(config.eval_data) if config.eval_data else None
    prepared = prepare_run_base(config, serving, progress=False)
    outline = outline_of(prepared)
    check_servable(config, outline.layout, serving)
    renderer = base_renderer(outline.tokenizer, config.allow_special_tokens)
    warnings = repetitions(data, held_out)
    for one in (data, held_out):
        if one is not None:
            warnings += _check_rows(one, config, renderer, outline)
    if serving is not None and held_out is not None and renderer is not None:
        check_questions(held_out, renderer, outline.context, serving.is_asked)
    if not config.packing:  # the number of packs is known only from tokens
        steps_for(len(data.rows), config)
    return warnings


def _check_rows(
    data: Dataset, config: TrainConfig, renderer: ChatRenderer | None, outline: BaseOutline
) -> list[str]:
    longest = min(config.max_seq_len, outline.context)
    rows = {row.line: row for row in (*one_row_per_role_order(data), *rows_that_may_not_fit(data, longest))}
    doubtful = replace(data, rows=[rows[line] for line in sorted(rows)])
    cut = encode_dataset(doubtful, renderer, outline.eos, longest).truncated
    if not cut:
        return []
    return [f"{data.path.name}: examples longer than {longest} tokens are truncated ({cut} of them)."]
