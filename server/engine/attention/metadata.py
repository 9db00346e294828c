"""A step's metadata for attention over gathered pages: index tensors, made once and used in every layer.

A KV slot is ``block * block_size + offset``. Sequences with one new token are computed as one padded batch.
Each longer chunk is computed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.sequence import Chunk


@dataclass(slots=True)
class DecodePart:
    """All sequences with one new token.

    Attributes:
        tokens: [n] the indices of their tokens in the step.
        kv_slots: [n, longest] their KV slots, padded with a slot that always holds zeros.
        lengths: [n] the number of valid KV slots, with the new token's.
    """

    tokens: Tensor
    kv_slots: Tensor
    lengths: Tensor
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, 1, longest]: 0 where a token is visible, -inf where it is not."""
        if window not in self._biases:
            position = torch.arange(self.kv_slots.shape[1], device=self.lengths.device)[None]
            last = self.lengths[:, None]
            seen = position < last
            if window is not None:
                seen &= position >= last - window
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._biases[window] = zeros.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self._biases[window]


@dataclass(slots=True)
class PrefillPart:
    """One sequence's chunk of several tokens.

    Attributes:
        start, stop: the range of its tokens in the step.
        kv_slots: [seen] the KV slots of all its tokens up to the chunk's last one.
    """

    start: int
    stop: int
    kv_slots: Tensor
    _seen: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the chunk starts at the sequence's first token, so that plain causal attention is right."""
        return self.kv_slots.shape[0] == self.stop - self.start

    def seen(self, window: int | None) -> Tensor:
        """[new, seen] bool: the tokens that each new token sees."""
        if window not in self._seen:
            total = self.kv_slots.shape[0]
            key = torch.arange(total, device=self.kv_slots.device)[None]
            query = key[0, total - (self.stop - self.start) :, None]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            self._seen[window] = seen
        return self._seen[window]


@dataclass(slots=True)
class AttentionMetadata:
    """Attributes: ``new_slots`` [tokens], the KV slot of each token of the step; and the parts."""

    new_slots: Tensor
    decode: DecodePart | None
    prefills: list[PrefillPart]


def build_metadata(
    chunks: SequenceOf[Chunk], block_size: int, padding: int, device: torch.device | str = "cpu"
) -> AttentionMetadata:
    """Index tensors for ``chunks``, whose tokens are concatenated in the step.

    ``padding`` is a KV slot that is never written. Masked values are still multiplied by 0, and 0 times a NaN
    of another request would be NaN.
    """
    new_slots: list[Tensor] = []
    prefills: list[PrefillPart] = []
    decode_tokens: list[int] = []
    decode_slots: list[Tensor] = []
    token = 0
    for chunk in chunks:
        slots = _kv_slots(chunk, block_size)
        new_slots.append(slots[chunk.start :])
        if chunk.length == 1:
            decode_tokens.append(token)
            decode_slots.append(slots)
        else:
            prefills.append(PrefillPart(token, token + chunk.length, slots.to(device)))
        token += chunk.length
    decode = None
    if decode_tokens:
        decode = DecodePart(
            tokens=torch.tensor(decode_tokens, device=device),
            kv_slots=torch.nn.utils.rnn.pad_sequence(
                decode_slots, batch_first=True, padding_value=padding
            ).to(device),
            lengths=torch.tensor([s.shape[0] for s in decode_slots], device=device),
        )
    return AttentionMetadata(torch.cat(new_slots).to(device), decode, prefills)


def _kv_slots(chunk: Chunk, block_size: int) -> Tensor:
    """[start + length] the KV slots of the sequence's tokens up to the chunk's last one."""
    table = chunk.sequence.table
    assert table is not None
    starts = torch.tensor(table.blocks) * block_size
    return (starts[:, None] + torch.arange(block_size)[None]).view(-1)[: chunk.start + chunk.length]
