"""From logits to tokens, for rows with a temperature: min_p, top_k, top_p, and the draw itself.

The draw is by inversion of the cumulative distribution. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.transfer import send
from server.engine.random_draws import uniform
from server.engine.request import SamplingParams
from server.engine.sequence import Sequence

_HEAD = 512
"""Most probable tokens looked at before a truncated row is sorted whole."""

_NO_TOP_K = 2**31


class Distributions:
    """The distributions of some rows, before any truncation.

    Args:
        logits: float32 [n, vocabulary].
        sequences: whose they are, each with a temperature above 0.
    """

    def __init__(self, logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
        table = send(torch.tensor([_numbers(s) for s in sequences], dtype=torch.float32), logits.device)
        self.probs = torch.softmax(logits / table[:, :1], dim=-1)
        self.uniform = table[:, 1:2].double()
        self._limits = table[:, 2:]

    def draw(self) -> Tensor:
        """[n] tokens, of rows that nothing truncates."""
        return _invert(self.probs, self.uniform)

    def draw_from_head(self) -> tuple[Tensor, Tensor]:
        """[n] tokens of truncated rows, and by row whether its most probable tokens were enough for that.

        Where they were not, the token is one of them all the same.
        """
        size = min(_HEAD, self.probs.shape[1])
        head, order = self.probs.topk(size, dim=-1)
        kept, enough = _truncate(head, self._limits, whole=size == self.probs.shape[1])
        return order.gather(1, _invert(kept, self.uniform)[:, None])[:, 0], enough

    def draw_from_all(self, rows: Tensor) -> Tensor:
        """[rows] tokens of truncated rows, however many of the vocabulary they take."""
        ordered, order = self.probs[rows].sort(dim=-1, descending=True)
        kept, _ = _truncate(ordered, self._limits[rows], whole=True)
        return order.gather(1, _invert(kept, self.uniform[rows])[:, None])[:, 0]


def is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _numbers(sequence: Sequence) -> tuple[float, ...]:
    p = sequence.params
    drawn = uniform(sequence.seed, len(sequence.tokens))
    return p.temperature, drawn, float(p.top_k or _NO_TOP_K), p.top_p, p.min_p


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """The first index at which the cumulative mass exceeds u times the whole. float64: 50,000 terms."""
    mass = probs.double().cumsum(-1)
    index = torch.searchsorted(mass, u * mass[:, -1:], right=True)[:, 0]
    return index.clamp_(max=probs.shape[1] - 1)


def _truncate(ordered: Tensor, limits: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Zero what min_p, top_k and top_p cut off rows of descending probabilities.

    Returns the kept probabilities, and whether each row's cut surely lies within the columns given.
    """
    width = ordered.shape[1]
    top_k, top_p, min_p = limits.split(1, dim=1)  # type: ignore[no-untyped-call]
    floor = ordered[:, :1] * min_p
    kept = ordered.masked_fill(ordered < floor, 0.0)
    kept = kept.masked_fill(torch.arange(width, device=ordered.device)[None] >= top_k, 0.0)
    complete = (kept[:, -1:] == 0) | (top_k <= width) | whole
    mass = kept.double().cumsum(-1)
    total = mass[:, -1:].masked_fill(~complete, 1.0)
    below = mass - kept < top_p * total
    enough = complete | (mass[:, -1:] >= top_p) & (floor == 0) & (top_k == _NO_TOP_K)
    return kept * below, enough[:, 0]
