"""A step's logits to tokens and log-probabilities; vectorised over the batch.

A row's result depends on that row's logits and on (seed, position) alone. ``sample`` runs on the logits'
device and never waits, so the next step can use its tokens before the host has read them.
``PendingSamples.read`` waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adapters.transfer import send
from server.engine.sampling.logits_processors import apply_logits_processors
from server.engine.sampling.truncation import Distributions, is_greedy, is_truncated
from server.engine.sequence import Sequence
from server.engine.transfer import Download

_RANKED = 20
"""Tokens ranked for every row with log-probabilities. A fixed number keeps the order of equal ones stable."""


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """The sampled token's log-probability, and the most likely tokens with theirs."""

    sampled: float
    top_ids: tuple[int, ...]
    top: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled token; None if the row's logits are not finite (a broken adapter).

    Attributes:
        revised: whether it differs from the one in ``PendingSamples.tokens``.
    """

    token: int | None
    logprobs: RankedLogprobs | None = None
    revised: bool = False


def sample(
    logits: Tensor, sequences: SequenceOf[Sequence], prev_tokens: Tensor | None = None
) -> PendingSamples:
    """Sample one token for each row.

    Args:
        logits: float32 [n, vocabulary]; not changed, and not used by the result.
        sequences: the rows' sequences, in order.
        prev_tokens: the tokens that the sequences' negative ids stand for (``transfer.resolve``).
    """
    shaped = apply_logits_processors(logits, sequences, prev_tokens)
    best, tokens = shaped.max(dim=-1)
    random = [i for i, s in enumerate(sequences) if not is_greedy(s.params)]
    truncated = [i for i in random if is_truncated(sequences[i].params)]
    whole = [i for i in random if not is_truncated(sequences[i].params)]
    if whole:
        _put(tokens, whole, _distributions(shaped, best, tokens, sequences, whole).sample())
    unsure = None
    if truncated:
        rows = _distributions(shaped, best, tokens, sequences, truncated)
        sampled, enough = rows.sample_from_head()
        _put(tokens, truncated, sampled)
        unsure = _Unsure(truncated, rows, enough)
    return PendingSamples(tokens, best, unsure, _rank(logits, sequences, tokens))


def _distributions(
    logits: Tensor, best: Tensor, best_tokens: Tensor, sequences: SequenceOf[Sequence], rows: list[int]
) -> Distributions:
    return Distributions(
        _pick(logits, rows), _pick(best, rows), _pick(best_tokens, rows), [sequences[i] for i in rows]
    )


class PendingSamples:
    """Sampled tokens that are being copied to the host.

    Args:
        tokens: int64 [n]; provisional in the rows of ``unsure``.
        best: float32 [n], each row's largest logit; finite if and only if the row is finite.
    """

    def __init__(self, tokens: Tensor, best: Tensor, unsure: _Unsure | None, ranked: _Ranked | None) -> None:
        self.tokens = tokens
        self._unsure = unsure
        self._ranked = ranked
        enough = [unsure.enough] if unsure else []
        self._download = Download([tokens, best, *enough, *(ranked.results if ranked else ())])

    def read(self) -> list[Sample]:
        """The sample of each row. Waits until the device has computed them."""
        tokens, best, *rest = self._download.wait()
        with _beside(self.tokens.device):
            revised = self._unsure.revise(rest.pop(0).tolist()) if self._unsure else {}
            logprobs = self._ranked.read(rest, revised) if self._ranked else {}
        return [
            Sample(revised.get(i, token) if math.isfinite(logit) else None, logprobs.get(i), i in revised)
            for i, (token, logit) in enumerate(zip(tokens.tolist(), best.tolist(), strict=True))
        ]


@dataclass(frozen=True, slots=True)
class _Unsure:
    """Truncated rows that were sampled from their most probable tokens only.

    ``enough`` [rows] says for which rows that was right. The device cannot branch and the host does not know
    yet, so the few other rows are sampled again when the step is read.
    """

    rows: list[int]
    distributions: Distributions
    enough: Tensor

    def revise(self, enough: list[bool]) -> dict[int, int]:
        """By row, the right tokens of the rows that were not sampled right."""
        wrong = [j for j, right in enumerate(enough) if not right]
        if not wrong:
            return {}
        tokens = self.distributions.sample_from_all(_on(wrong, self.enough.device)).tolist()
        return {self.rows[j]: token for j, token in zip(wrong, tokens, strict=True)}


# -- log-probabilities ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Log-probabilities of the rows that asked for them: the whole table, and the part copied to the host.

    Attributes:
        counts: by row, how many of the most likely tokens it asked for.
        results: the sampled tokens' log-probabilities; the most likely tokens; their log-probabilities.
    """

    counts: dict[int, int]
    table: Tensor
    results: tuple[Tensor, Tensor, Tensor]

    def read(self, results: SequenceOf[Tensor], revised: dict[int, int]) -> dict[int, RankedLogprobs]:
        own, ids, top = (result.tolist() for result in results)
        for j, i in enumerate(self.counts):
            if i in revised:
                own[j] = self.table[j, revised[i]].item()
        ranked = zip(self.counts.items(), own, ids, top, strict=True)
        return {
            i: RankedLogprobs(value, tuple(row_ids[:k]), tuple(row[:k]))
            for (i, k), value, row_ids, row in ranked
        }


def _rank(logits: Tensor, sequences: SequenceOf[Sequence], sampled: Tensor) -> _Ranked | None:
    """Log-probabilities of the model's own distribution, before any logits processor."""
    counts = {i: s.params.logprobs for i, s in enumerate(sequences) if s.params.logprobs is not None}
    if not counts:
        return None
    table = torch.log_softmax(_pick(logits, list(counts)), dim=-1)
    most = min(max(_RANKED, *counts.values()), logits.shape[1])
    top, ids = table.topk(most, dim=-1)
    own = table.gather(1, _pick(sampled, list(counts))[:, None])[:, 0]
    return _Ranked(counts, table, (own, ids, top))


# -- rows -----------------------------------------------------------------------------------------


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """The given rows, in order; the tensor itself if these are all rows."""
    return tensor if len(rows) == len(tensor) else tensor[_on(rows, tensor.device)]


def _put(tensor: Tensor, rows: list[int], values: Tensor) -> None:
    tensor[_on(rows, tensor.device)] = values


def _on(rows: list[int], device: torch.device) -> Tensor:
    return send(torch.tensor(rows), device)


def _beside(device: torch.device) -> AbstractContextManager[object]:
    """A stream whose work does not queue behind the step that is running."""
    return torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
