"""Packs examples into batches without padding. A batch is one row, in which each example attends to itself.

transformers masks attention between examples where ``position_ids`` restart (``masking_utils``,
``find_packed_sequence_indices``). Kernels without a mask use ``cu_seq_lens_q`` etc., as
``DataCollatorWithFlattening`` gives them, so no layer has to ask the GPU where examples begin.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from adapters.training.encode import Example

Pack = list[Example]
"""The examples of one element of a batch."""


def pack(examples: Sequence[Example], capacity: int) -> list[Pack]:
    """Best-fit decreasing: each example goes to the pack that it fills best. The result is deterministic."""
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # free tokens and the pack's index, sorted
    for example in sorted(examples, key=lambda one: -len(one.ids)):
        length = len(example.ids)
        place = bisect_left(room, (length, 0))
        free, index = room.pop(place) if place < len(room) else (capacity, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(example)
        insort(room, (free - length, index))
    return packs


def collate(packs: Sequence[Pack]) -> dict[str, Any]:
    """One row for the model. The head is computed only at the positions of the loss.

    Returns:
        ``input_ids`` and ``position_ids`` [1, tokens]; ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32
        [examples + 1], where examples begin; ``max_length_q`` and ``max_length_k``, ints, the longest
        example's tokens; ``logits_to_keep`` [trained], the positions whose next token is learnt; ``labels``
        and ``shift_labels`` [1, trained], those tokens.
    """
    examples = [example for one in packs for example in one]
    ids = [token for example in examples for token in example.ids]
    positions = [place for example in examples for place in range(len(example.ids))]
    learnt = [place for place, wanted in enumerate(_flags(examples)) if wanted]
    targets = torch.tensor([[ids[place] for place in learnt]])
    lengths = [len(example.ids) for example in examples]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "logits_to_keep": torch.tensor(learnt) - 1,
        "labels": targets,
        "shift_labels": targets,
    }


def _flags(examples: Sequence[Example]) -> list[bool]:
    """Whether each token of the row is learnt.

    An example's first token is not, because nothing precedes it.
    """
    return [flag and place > 0 for example in examples for place, flag in enumerate(example.learnt)]
