"""A step's chunks as one flat list of tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from adapters.kernels import Segment
from server.engine.sequence import Chunk


def lora_segments(chunks: SequenceOf[Chunk]) -> list[Segment]:
    """The step's runs of tokens that share an adapter. The base's tokens are in no segment."""
    segments: list[Segment] = []
    token = 0
    for chunk in chunks:
        slot, stop = chunk.sequence.slot, token + chunk.length
        if slot >= 0:
            if segments and segments[-1].slot == slot and segments[-1].stop == token:
                segments[-1] = Segment(slot, segments[-1].start, stop)
            else:
                segments.append(Segment(slot, token, stop))
        token = stop
    return segments


def flatten(chunks: SequenceOf[Chunk]) -> tuple[Tensor, Tensor, Tensor]:
    """The step's token ids [tokens], their positions [tokens], and the indices of those that give logits.

    A negative id stands for a token that the host has not read yet (``transfer.resolve``).
    """
    tokens: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    for chunk in chunks:
        stop = chunk.stop
        tokens += chunk.sequence.tokens[chunk.start : stop]
        positions += range(chunk.start, stop)
        if chunk.samples:
            last.append(len(tokens) - 1)
    return torch.tensor(tokens), torch.tensor(positions), torch.tensor(last, dtype=torch.long)
