"""Logits to tokens: penalties, truncation, the draw, log-probabilities; vectorised over the batch.

A row's result depends on that row's logits and on (seed, position) alone. Order of things, as in
transformers and vLLM: logit_bias, penalties, min_tokens; temperature; min_p, top_k, top_p; the draw by
inversion of the cumulative distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.random_draws import uniform
from server.engine.request import SamplingParams
from server.engine.sequence import Sequence

_HEAD = 512
"""Most probable tokens looked at before a truncated row is sorted whole."""

_NO_TOP_K = 2**31


_RANKED = 20
"""Most likely tokens ranked for whoever asks for any: how many one ranks changes the order of equal ones."""


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """The drawn token's log-probability, and the most likely tokens with theirs."""

    drawn: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token; None if the row's logits are not finite (a broken adapter)."""

    token: int | None
    logprobs: RankedLogprobs | None = None


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Draw]:
    """One draw a row.

    Args:
        logits: float32 [n, vocabulary]; not changed.
        sequences: whose rows they are, in order.
    """
    shaped = _shape(logits, sequences)
    best, tokens = shaped.max(dim=-1)
    random = [i for i, s in enumerate(sequences) if s.params.temperature > 0]
    if random:
        rows = shaped if len(random) == len(sequences) else shaped[random]
        tokens[random] = _draw(rows, [sequences[i] for i in random])
    drawn = tokens.tolist()
    logprobs = _logprobs(logits, sequences, drawn)
    return [
        Draw(token if math.isfinite(logit) else None, logprobs.get(i))
        for i, (token, logit) in enumerate(zip(drawn, best.tolist(), strict=True))
    ]


# -- logit_bias, penalties, min_tokens ------------------------------------------------------------


def _shape(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    changed = [i for i, s in enumerate(sequences) if _is_shaped(s)]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        _shape_row(logits[i], sequences[i])
    return logits


def _is_shaped(sequence: Sequence) -> bool:
    p = sequence.params
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalised or p.logit_bias or _forbidden(sequence))


def _forbidden(sequence: Sequence) -> set[int]:
    """Tokens that would end the answer before its ``min_tokens``."""
    p = sequence.params
    if sequence.num_generated >= p.min_tokens:
        return set()
    return set(p.stop_token_ids) | (set() if p.ignore_eos else sequence.eos)


def _shape_row(row: Tensor, sequence: Sequence) -> None:
    p = sequence.params
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    generated = sequence.tokens[sequence.num_prompt :]
    if generated and (p.presence_penalty or p.frequency_penalty):
        ids, counts = torch.tensor(generated, device=row.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        row[ids] -= p.presence_penalty + p.frequency_penalty * counts
    for token, bias in p.logit_bias.items():
        row[token] += bias
    row[sorted(token for token in _forbidden(sequence) if token < row.shape[0])] = float("-inf")


# -- the draw -------------------------------------------------------------------------------------


def _draw(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """[n] token ids, for rows with a temperature above 0."""
    temperature = _column(logits, [s.params.temperature for s in sequences])
    probs = torch.softmax(logits / temperature, dim=-1)
    u = _column(logits, [uniform(s.seed, len(s.tokens)) for s in sequences]).double()
    truncated = [i for i, s in enumerate(sequences) if _is_truncated(s.params)]
    tokens = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    whole = [i for i in range(len(sequences)) if i not in set(truncated)]
    if whole:
        tokens[whole] = _invert(probs[whole], u[whole])
    if truncated:
        params = [sequences[i].params for i in truncated]
        tokens[truncated] = _draw_truncated(probs[truncated], params, u[truncated])
    return tokens


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """The first index at which the cumulative mass exceeds u times the whole. float64: 50,000 terms."""
    mass = probs.double().cumsum(-1)
    index = torch.searchsorted(mass, u * mass[:, -1:], right=True)[:, 0]
    return index.clamp_(max=probs.shape[1] - 1)


def _draw_truncated(probs: Tensor, params: SequenceOf[SamplingParams], u: Tensor) -> Tensor:
    size = min(_HEAD, probs.shape[1])
    head, order = probs.topk(size, dim=-1)
    kept, enough = _truncate(head, params, whole=size == probs.shape[1])
    tokens = order.gather(1, _invert(kept, u)[:, None])[:, 0]
    rest = [i for i, e in enumerate(enough.tolist()) if not e]
    if rest:
        ordered, order = probs[rest].sort(dim=-1, descending=True)
        kept, _ = _truncate(ordered, [params[i] for i in rest], whole=True)
        tokens[rest] = order.gather(1, _invert(kept, u[rest])[:, None])[:, 0]
    return tokens


def _truncate(ordered: Tensor, params: SequenceOf[SamplingParams], whole: bool) -> tuple[Tensor, Tensor]:
    """Zero what min_p, top_k and top_p cut off rows of descending probabilities.

    Returns the kept probabilities, and whether each row's cut surely lies within the columns given.
    """
    width = ordered.shape[1]
    top_k = torch.tensor([p.top_k or _NO_TOP_K for p in params], device=ordered.device)[:, None]
    top_p = _column(ordered, [p.top_p for p in params])
    floor = ordered[:, :1] * _column(ordered, [p.min_p for p in params])
    kept = ordered.masked_fill(ordered < floor, 0.0)
    kept = kept.masked_fill(torch.arange(width, device=ordered.device)[None] >= top_k, 0.0)
    complete = (kept[:, -1:] == 0) | (top_k <= width) | whole
    mass = kept.double().cumsum(-1)
    total = torch.where(complete, mass[:, -1:], 1.0)
    below = mass - kept < top_p * total
    enough = complete | (mass[:, -1:] >= top_p) & (floor == 0) & (top_k == _NO_TOP_K)
    return kept * below, enough[:, 0]


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).to(like.dtype)[:, None]


# -- log-probabilities ----------------------------------------------------------------------------


def _logprobs(logits: Tensor, sequences: SequenceOf[Sequence], drawn: list[int]) -> dict[int, RankedLogprobs]:
    """By row, for those that asked; of the model's own distribution."""
    asked = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    if not asked:
        return {}
    table = torch.log_softmax(logits[asked], dim=-1)
    most = min(max(_RANKED, *(sequences[i].params.logprobs or 0 for i in asked)), logits.shape[1])
    top, ids = table.topk(most, dim=-1)
    own = table.gather(1, torch.tensor([drawn[i] for i in asked], device=logits.device)[:, None])[
        :, 0
    ].tolist()
    ranked = zip(asked, own, ids.tolist(), top.tolist(), strict=True)
    return {
        i: RankedLogprobs(value, tuple(row_ids[: (k := sequences[i].params.logprobs or 0)]), tuple(row[:k]))
        for i, value, row_ids, row in ranked
    }
