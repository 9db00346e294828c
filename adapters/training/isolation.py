"""Checks the attention of a training run: rows of a batch must not see each other, and windows must be right.

A batch is one sequence of rows (``packing.collate``).

Some models do not tell their attention where a row begins, and recurrent layers pass their state on to the
next row. So each run measures it on its own model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from adapters.base.unpack import four_bit_linears
from adapters.errors import RecipeInvalid
from adapters.training.encode import Example
from adapters.training.packing import collate
from adapters.training.recipe import TrainConfig

BOUND = 0.03
"""The largest ``mixing`` of separate rows.

Measured in bf16 on tiny random models of 60 architectures: 0.0000 if rows are separate, 0.07 to 1.4 if not.
Rounding may differ in a sparse model, because its experts get other numbers of tokens.
"""

_SAME = 0.15
"""The largest deviation of two right attentions. Rounding explains 0.04, and a wrong window gives 0.8."""

_FIRST, _LAST = 16, 4
"""Tokens of the two rows. The last one is short, because attention and state fade with the distance."""


def keep_rows_separate(
    model: Any, own: str, config: TrainConfig, longest: int
) -> tuple[TrainConfig, str | None]:
    """Change the model's attention, or else the batches, if rows would see each other.

    Args:
        own: the name of transformers' attention for ``model``, which may have another one now.
        longest: tokens of the longest row.

    Returns:
        The config to train with, and a message if something has changed. With one row in a forward pass, a
        step still has the same rows.

    Raises:
        RecipeInvalid: ``packing`` would mix rows.
    """
    name = type(model).__name__
    is_own = model.config.get_text_config()._attn_implementation == own
    if _mixing_or_failure(model) <= BOUND and (is_own or _has_same_window(model, own, longest)):
        return config, None
    if not is_own:
        model.set_attn_implementation(own)
        if _mixing_or_failure(model) <= BOUND:
            return config, f"{name} is right only with transformers' own attention, which is slower."
    if config.packing:
        raise RecipeInvalid(f"{name} would mix the rows of a pack; leave out --packing.")
    if config.batch_size == 1:
        return config, None
    single = replace(config, batch_size=1, accumulation=config.accumulation * config.batch_size)
    return single, (
        f"{name} would mix the rows of a batch, so each forward pass has one row, and a step has "
        f"{single.accumulation} passes."
    )


@torch.no_grad()
def mixing(model: Any) -> float:
    """How much a row's logits depend on the row before it.

    Returns:
        The root mean square difference of a token's logits when the row before has other tokens, in standard
        deviations of the logits. The mean over tokens counts, because in a sparse model rounding alone can
        send a token to another expert.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    one, other, last = (
        torch.randint(vocabulary, (length,), generator=generator).tolist()
        for length in (_FIRST, _FIRST, _LAST)
    )
    after_one, after_other = (_last_logits(model, [first, last]) for first in (one, other))
    return _deviation(after_one, after_other)


@torch.no_grad()
def _has_same_window(model: Any, own: str, longest: int) -> bool:
    """Whether the window that the layers state is that of transformers' own attention.

    transformers' own attention only has the model's mask, and some masks do not have the window. It makes no
    difference if rows have at most ``longest`` tokens and the window is wider.
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window >= longest:
        return True
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(text.vocab_size, (min(longest, window + _FIRST),), generator=generator).tolist()
    present = text._attn_implementation
    found = _last_logits(model, [row])[-_LAST:]
    model.set_attn_implementation(own)
    try:
        return _deviation(found, _last_logits(model, [row])[-_LAST:]) <= _SAME
    finally:
        model.set_attn_implementation(present)


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The mean over tokens of the root mean square difference, in standard deviations of the logits."""
    by_token = (found - expected).square().mean(-1).sqrt() / expected.std()
    return float(by_token.nan_to_num(nan=math.inf).mean())


def _mixing_or_failure(model: Any) -> float:
    """``mixing``; infinity if the model cannot compute two rows with its present attention."""
    try:
        return mixing(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return math.inf


def _last_logits(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """Logits of the last row of a batch of ``rows``, float32 [tokens, vocabulary]."""
    batch = collate([[Example(row, [True] * len(row)) for row in rows]])
    for name in ("labels", "shift_labels", "logits_to_keep"):
        del batch[name]
    on_device = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    with linears_in_training(model):
        logits: torch.Tensor = model(**on_device, use_cache=False).logits[0, -len(rows[-1]) :]
    return logits.float()


@contextmanager
def linears_in_training(model: Any) -> Iterator[None]:
    """On a CPU, a 4-bit linear that is not in training mode changes the layout of its weight for good."""
    linears = four_bit_linears(model).values()
    before = [linear.training for linear in linears]
    try:
        for linear in linears:
            linear.training = True
        yield
    finally:
        for linear, training in zip(linears, before, strict=True):
            linear.training = training
