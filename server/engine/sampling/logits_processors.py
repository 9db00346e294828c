"""Changes to the logits before sampling: logit_bias, min_tokens, penalties, in this order, as in vLLM.

Each processor is one call for all rows that ask for it, and costs the other rows nothing. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from adapters.transfer import send
from server.engine.sampling.token_counts import TokenCounts
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Sequence
from server.engine.transfer import resolve


class LogitBias:
    """A request's ``logit_bias``: token ids, int64 [n], and the biases of their logits, float32 [n]."""

    def __init__(self, biases: Mapping[int, float], device: torch.device) -> None:
        self.ids = send(torch.tensor(list(biases)), device)
        self.values = send(torch.tensor(list(biases.values()), dtype=torch.float32), device)


def apply_logits_processors(
    logits: Tensor, sequences: SequenceOf[Sequence], prev_tokens: Tensor | None
) -> Tensor:
    """The logits after all processors: the same tensor if no row asks for any, else a copy.

    Args:
        logits: float32 [n, vocabulary].
        sequences: the rows' sequences, in order.
        prev_tokens: the tokens that the sequences' negative ids stand for (``transfer.resolve``).
    """
    biased = [i for i, s in enumerate(sequences) if s.params.logit_bias]
    short = [i for i, s in enumerate(sequences) if s.num_generated < s.params.min_tokens]
    penalised = [i for i, s in enumerate(sequences) if _is_penalised(s.params)]
    if not (biased or short or penalised):
        return logits
    shaped = logits.clone(memory_format=torch.contiguous_format)
    if biased:
        _add_biases(shaped, biased, sequences)
    if short:
        _forbid_ends(shaped, short, sequences)
    if penalised:
        _penalise(shaped, penalised, sequences, prev_tokens)
    return shaped


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _add_biases(logits: Tensor, rows: list[int], sequences: SequenceOf[Sequence]) -> None:
    biases = [_bias_of(sequences[i], logits.device) for i in rows]
    starts = torch.tensor(rows) * logits.shape[1]
    places = _repeated(starts, [len(bias.ids) for bias in biases], logits.device)
    places += torch.cat([bias.ids for bias in biases])
    logits.view(-1).index_add_(0, places, torch.cat([bias.values for bias in biases]))


def _bias_of(sequence: Sequence, device: torch.device) -> LogitBias:
    """The request's biases on the device, made when any of its answers is first sampled."""
    shared = sequence.shared
    if shared.bias is None:
        shared.bias = LogitBias(sequence.params.logit_bias, device)
    return shared.bias


def _forbid_ends(logits: Tensor, rows: list[int], sequences: SequenceOf[Sequence]) -> None:
    """Mask the tokens that would end an answer before its ``min_tokens``."""
    places = [(row, token) for row in rows for token in sequences[row].ends if token < logits.shape[1]]
    if places:
        where, ids = send(torch.tensor(places), logits.device).unbind(1)
        logits[where, ids] = float("-inf")


def _penalise(
    logits: Tensor, rows: list[int], sequences: SequenceOf[Sequence], prev_tokens: Tensor | None
) -> None:
    """Penalise the tokens that a row contains. For a token that the answer contains s times:

    logit / repetition if the logit is above 0, else logit * repetition;
    then minus (presence * min(s, 1) + frequency * s).
    """
    own = [sequences[i] for i in rows]
    counts = [_counts_of(sequence) for sequence in own]
    of = _repeated(torch.arange(len(rows)), [len(count.ids) for count in counts], logits.device)
    ids, said = (
        send(torch.from_numpy(np.concatenate(parts)), logits.device)
        for parts in ([count.ids for count in counts], [count.said for count in counts])
    )
    late = [i for i, sequence in enumerate(own) if sequence.tokens[-1] < 0]
    if late:
        latest = send(torch.tensor([own[i].tokens[-1] for i in late]), logits.device)
        of, ids, said = _with_latest(of, ids, said, len(own), late, resolve(latest, prev_tokens))
    flat = logits.view(-1)
    places = send(torch.tensor(rows), logits.device).mul_(logits.shape[1]).index_select(0, of).add_(ids)
    flat.scatter_(0, places, _penalised(flat.index_select(0, places), own, of, said))


def _penalised(values: Tensor, sequences: SequenceOf[Sequence], of: Tensor, said: Tensor) -> Tensor:
    """[n] penalised logits; ``sequences[of[i]]`` contains the i-th token ``said[i]`` times in its answer."""

    def each(numbers: list[float]) -> Tensor:
        return send(torch.tensor(numbers, dtype=torch.float32), values.device).index_select(0, of)

    params = [sequence.params for sequence in sequences]
    if any(p.repetition_penalty != 1.0 for p in params):
        repetition = each([p.repetition_penalty for p in params])
        values = torch.where(values > 0, values / repetition, values * repetition)
    if any(p.presence_penalty or p.frequency_penalty for p in params):
        presence = each([p.presence_penalty for p in params]) * said.clamp(max=1.0)
        values = values - (presence + each([p.frequency_penalty for p in params]) * said)
    return values


def _counts_of(sequence: Sequence) -> TokenCounts:
    if sequence.counts is None:
        repetition = sequence.params.repetition_penalty != 1.0
        prompt = sequence.tokens[: sequence.num_prompt] if repetition else []
        sequence.counts = TokenCounts(prompt, sequence.num_prompt)
    sequence.counts.follow(sequence.tokens)
    return sequence.counts


def _with_latest(
    of: Tensor, ids: Tensor, said: Tensor, n: int, late: list[int], latest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the tokens that only the device knows: one entry for each of the rows ``late``.

    A row may then have two entries of one token, with the same count.
    """
    rows = send(torch.tensor(late), of.device)
    by_row = torch.full((n,), -1, device=of.device).index_copy_(0, rows, latest)
    said = said + (ids == by_row[of])
    known = torch.zeros(n, device=of.device).index_add_(0, of, torch.where(ids == by_row[of], said, 0.0))
    return torch.cat([of, rows]), torch.cat([ids, latest]), torch.cat([said, known[rows].clamp_(min=1.0)])


def _repeated(values: Tensor, times: list[int], device: torch.device) -> Tensor:
    """``values[i]`` repeated ``times[i]`` times. The output size is given, so nothing waits for a GPU."""
    values, counts = send(torch.stack([values, torch.tensor(times)]), device)
    return torch.repeat_interleave(values, counts, output_size=sum(times))
