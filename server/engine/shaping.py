"""What requests change about a row of logits before anything is drawn: penalties, logit_bias, min_tokens.

In that order, as in transformers and vLLM. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.transfer import send
from server.engine.sequence import Sequence
from server.engine.transfer import resolve


def shape(logits: Tensor, sequences: SequenceOf[Sequence], unread: Tensor | None) -> Tensor:
    """The logits as the requests want them: the same tensor if nobody wants anything, else a copy.

    Args:
        unread: the tokens that the sequences' negative ids stand for (``transfer.resolve``).
    """
    changed = [i for i, s in enumerate(sequences) if _is_shaped(s)]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        _shape_row(logits[i], sequences[i], unread)
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


def _shape_row(row: Tensor, sequence: Sequence, unread: Tensor | None) -> None:
    p = sequence.params
    if p.repetition_penalty != 1.0:
        seen = resolve(_ids(sequence.tokens, row), unread)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    generated = sequence.tokens[sequence.num_prompt :]
    if generated and (p.presence_penalty or p.frequency_penalty):
        said = resolve(_ids(generated, row), unread)
        counts = torch.zeros_like(row).index_add_(0, said, torch.ones_like(row[said]))
        row[said] = row[said] - (p.presence_penalty + p.frequency_penalty * counts[said])
    if p.logit_bias:
        biases = send(torch.tensor(list(p.logit_bias.values()), dtype=row.dtype), row.device)
        row[_ids(p.logit_bias, row)] += biases
    if forbidden := [token for token in _forbidden(sequence) if token < row.shape[0]]:
        row.index_fill_(0, _ids(forbidden, row), float("-inf"))


def _ids(tokens: Iterable[int], row: Tensor) -> Tensor:
    return send(torch.tensor(list(tokens), dtype=torch.long), row.device)
