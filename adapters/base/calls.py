"""Which linears of a base can take an adapter: those that get each token once and return one row for each."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TOKENS = 5


class Call(NamedTuple):
    """One call of a linear: the rows that it got, and whether it returned one tensor with a row for each."""

    rows: int
    is_plain: bool


@contextmanager
def noting_calls(model: Any, names: Iterable[str]) -> Iterator[Mapping[str, set[Call]]]:
    """Record the calls of these linears, by name."""
    calls: dict[str, set[Call]] = {name: set() for name in names}

    def note(seen: set[Call], _: object, inputs: tuple[Tensor, ...], output: object) -> None:
        rows = inputs[0].shape[:-1]
        is_plain = isinstance(output, Tensor) and output.shape[:-1] == rows
        seen.add(Call(math.prod(rows), is_plain))

    hooks = [
        model.get_submodule(name).register_forward_hook(partial(note, seen)) for name, seen in calls.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def why_unservable(calls: Collection[Call], tokens: int) -> str | None:
    """Why a linear with these calls takes no adapter; None = it takes one. The pass had ``tokens`` tokens."""
    if any(not call.is_plain for call in calls):
        return "it returns more than a linear's output, as routers of experts do"
    if {call.rows for call in calls} != {tokens}:
        return "the base does not run it on each token of a step by itself"
    return None


@torch.no_grad()
def unservable_linears(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Run ``model`` on a few tokens, of which one gives logits. Returns the linears that take no adapter, and
    why."""
    tokens = torch.arange(_TOKENS, device=model.device)[None]
    with noting_calls(model, names) as calls:
        model(
            input_ids=tokens,
            position_ids=tokens,
            logits_to_keep=torch.tensor([_TOKENS // 2], device=model.device),
            use_cache=False,
        )
    found = {name: why_unservable(some, _TOKENS) for name, some in calls.items()}
    return {name: reason for name, reason in found.items() if reason is not None}
