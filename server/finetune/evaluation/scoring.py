"""Computes log-probabilities of prompt tokens in the same engine steps that compute the prompt.

The engine's model returns logits only where a token is sampled. ``PromptScorer`` wraps the model. It asks for
the logits of further tokens in each step, and returns those that the engine expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from server.engine.sequence import Chunk

Targets = Mapping[int, int]
"""By position in a prompt: the next token, whose log-probability is wanted."""


class Model(Protocol):
    """The part of ``server.engine.model.StepModel`` that scoring needs."""

    def __call__(
        self, chunks: Sequence[Chunk], rows: Tensor | None = None, prev_tokens: Tensor | None = None
    ) -> Tensor: ...


class PromptScorer:
    """A model for the engine that also scores prompts.

    Args:
        model: the engine's model.
        targets: by request id. Requests without targets are only served.

    Attributes:
        logprobs: the log-probabilities so far, by request id and position.
    """

    def __init__(self, model: Model, targets: Mapping[str, Targets]) -> None:
        self._model = model
        self._targets = targets
        self.logprobs: dict[str, dict[int, float]] = {request_id: {} for request_id in targets}

    def __call__(self, chunks: Sequence[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        """float32 logits [chunks that sample, vocabulary]."""
        plan = _Plan()
        for chunk in chunks:
            plan.add(chunk, self._targets.get(chunk.sequence.request_id, {}))
        logits = self._model(chunks, torch.tensor(plan.rows, dtype=torch.long), prev_tokens)
        if plan.scored:
            self._note(logits, plan.scored)
        return logits[plan.sampled]

    def _note(self, logits: Tensor, scored: Sequence[_Scored]) -> None:
        rows = [one.row for one in scored]
        tokens = torch.tensor([one.token for one in scored], device=logits.device)
        values = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
        for one, value in zip(scored, values, strict=True):
            self.logprobs[one.request_id][one.position] = value


@dataclass(frozen=True, slots=True)
class _Scored:
    """``row`` of the logits has the log-probability of ``token`` after ``position``."""

    row: int
    request_id: str
    position: int
    token: int


@dataclass(slots=True)
class _Plan:
    """The tokens of a step that give logits, and the use of each row of the logits."""

    rows: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    scored: list[_Scored] = field(default_factory=list)
    _begin: int = 0

    def add(self, chunk: Chunk, targets: Targets) -> None:
        for offset in range(chunk.length):
            position, row = chunk.start + offset, len(self.rows)
            samples = chunk.samples and offset == chunk.length - 1
            if position in targets:
                self.scored.append(_Scored(row, chunk.sequence.request_id, position, targets[position]))
            if samples:
                self.sampled.append(row)
            if samples or position in targets:
                self.rows.append(self._begin + offset)
        self._begin += chunk.length
