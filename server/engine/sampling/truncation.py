"""From logits to tokens, for rows with a temperature: min_p, top_k, top_p, then sampling.

Tokens are sampled by inverting the cumulative distribution. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.transfer import send
from server.engine.sampling.rng import uniform
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Sequence

_HEAD = 512
"""A truncated row is sampled from this many most probable tokens before it is sorted whole."""

_NO_TOP_K = 2**31

_GREEDY_TEMPERATURE = 1e-5
"""Below it the most probable token is taken, as in vLLM; that is the limit of small temperatures."""


class Distributions:
    """The distributions of some rows, before any truncation.

    Args:
        logits: float32 [n, vocabulary].
        best: [n] each row's largest logit.
        best_tokens: [n] the token with that logit.
        sequences: the rows' sequences, none of them greedy.
    """

    def __init__(
        self, logits: Tensor, best: Tensor, best_tokens: Tensor, sequences: SequenceOf[Sequence]
    ) -> None:
        # In float32, a number in [0, 1) may round to 1, and a small top_p to 0.
        table = send(torch.tensor([_numbers(s) for s in sequences], dtype=torch.float64), logits.device)
        # The largest logit becomes 0, which no temperature makes infinite.
        self.probs = torch.softmax((logits - best[:, None]).div_(table[:, :1].float()), dim=-1)
        self.uniform = table[:, 1:2]
        self._limits = table[:, 2:]
        self._best_tokens = best_tokens

    def sample(self) -> Tensor:
        """[n] tokens of rows that are not truncated."""
        return _invert(self.probs, self.uniform, self._best_tokens)

    def sample_from_head(self) -> tuple[Tensor, Tensor]:
        """[n] tokens of truncated rows, and for each row whether its most probable tokens were enough.

        Where they were not, the token is provisional.
        """
        size = min(_HEAD, self.probs.shape[1])
        head, order = self.probs.topk(size, dim=-1)
        kept, enough = _truncate(head, self._limits, whole=size == self.probs.shape[1])
        return _pick(order, kept, self.uniform), enough

    def sample_from_all(self, rows: Tensor) -> Tensor:
        """[rows] tokens of truncated rows, sampled from the whole vocabulary."""
        ordered, order = self.probs[rows].sort(dim=-1, descending=True)
        kept, _ = _truncate(ordered, self._limits[rows], whole=True)
        return _pick(order, kept, self.uniform[rows])


def is_greedy(params: SamplingParams) -> bool:
    """Whether only the most probable token can be sampled."""
    return params.temperature < _GREEDY_TEMPERATURE or params.top_k == 1 or params.top_p == 0.0


def is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _numbers(sequence: Sequence) -> tuple[float, ...]:
    p = sequence.params
    random = uniform(sequence.seed, len(sequence.tokens))
    return p.temperature, random, float(p.top_k or _NO_TOP_K), p.top_p, p.min_p


def _invert(probs: Tensor, u: Tensor, otherwise: Tensor) -> Tensor:
    """[n] the first index at which the cumulative mass exceeds u times the total; its own mass is above 0.

    The sum is in float64, because it may have 50,000 terms. The threshold stays below the total, so an index
    with mass reaches it. A GPU sums in parallel, so rounding may make the sum grow at an index without mass.
    Such a row, and a row that is not finite, gets ``otherwise``.
    """
    mass = probs.cumsum(-1, dtype=torch.float64)
    whole = mass[:, -1:]
    threshold = torch.minimum(u * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(mass, threshold, right=True).clamp_(max=probs.shape[1] - 1)
    return torch.where(probs.gather(1, index) > 0, index, otherwise[:, None])[:, 0]


def _pick(order: Tensor, kept: Tensor, u: Tensor) -> Tensor:
    """[n] tokens of ``order``, sampled by the kept probabilities; the first of them is the largest."""
    indices = _invert(kept, u, torch.zeros_like(order[:, 0]))
    return order.gather(1, indices[:, None])[:, 0]


def _truncate(ordered: Tensor, limits: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Zero the probabilities that min_p, top_k and top_p cut off. Rows are in descending order.

    Returns the kept probabilities, and for each row whether its cut is certain to lie within these columns.

    Args:
        limits: float64 [n, 3].
        whole: whether the columns are the whole vocabulary.
    """
    width = ordered.shape[1]
    top_k, top_p, min_p = limits.split(1, dim=1)  # type: ignore[no-untyped-call]
    floor = ordered[:, :1] * min_p.float()
    kept = ordered.masked_fill(ordered < floor, 0.0)
    kept = kept.masked_fill(torch.arange(width, device=ordered.device)[None] >= top_k, 0.0)
    complete = (kept[:, -1:] == 0) | (top_k <= width) | whole
    mass = kept.double().cumsum(-1)
    total = mass[:, -1:].masked_fill(~complete, 1.0)
    below = mass - kept < top_p * total
    below[:, 0] = True  # however small top_p is, the most probable token stays
    enough = complete | (mass[:, -1:] >= top_p) & (floor == 0) & (top_k == _NO_TOP_K)
    return kept * below, enough[:, 0]
