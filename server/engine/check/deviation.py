"""How far steps are from transformers' own logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.check.sample import Request, Step, chunks_of
from server.engine.model import StepModel

Deviations = dict[int, float]
"""By request, the larger one of its prompt's deviation (the mean) and of its decoded tokens' (the median)."""


def deviations(
    model: StepModel, steps: Sequence[Step], requests: Sequence[Request], expected: Sequence[Tensor]
) -> Deviations:
    """Compute ``steps`` and compare all their logits.

    A token's deviation is the root mean square difference of its logits, in standard deviations of the
    request's logits. In a sparse model rounding alone can send a token to another expert. So the mean counts
    of a prompt's many tokens, and the median of the few decoded ones.

    Args:
        expected: by request, float32 [tokens, vocabulary], on the host.
    """
    rows: dict[tuple[int, bool], list[Tensor]] = {}
    for step in steps:
        sizes = [part.stop - part.start for part in step]
        logits = torch.split(_all_logits(model, step, requests), sizes)
        for part, got in zip(step, logits, strict=True):
            off = by_token(got, expected[part.request][part.start : part.stop], expected[part.request])
            rows.setdefault((part.request, len(got) == 1), []).append(off)
    found: Deviations = {}
    for (request, is_decoded), of_chunks in rows.items():
        off = torch.cat(of_chunks)
        found[request] = max(found.get(request, 0.0), _median(off) if is_decoded else _mean(off))
    return found


def by_token(got: Tensor, expected: Tensor, all_expected: Tensor) -> Tensor:
    """[n] the deviations of n tokens, whose logits are ``got`` and should be ``expected``."""
    return (got - expected).square().mean(-1).sqrt() / all_expected.std()


def spread(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The deviation between two correct computations of the same requests."""
    return max(_mean(by_token(a, b, b)) for a, b in zip(one, other, strict=True))


def _mean(off: Tensor) -> float:
    return float(off.nan_to_num(nan=float("inf")).mean())


def _median(off: Tensor) -> float:
    return float(off.median()) if bool(off.isfinite().all()) else math.inf


def _all_logits(model: StepModel, step: Step, requests: Sequence[Request]) -> Tensor:
    """[tokens, vocabulary]. A step of decoding is given as the engine gives it, so CUDA graphs may run."""
    chunks = chunks_of(step, requests)
    count = sum(chunk.length for chunk in chunks)
    rows = None if count == len(chunks) else torch.arange(count)
    return model(chunks, rows).float().cpu()
