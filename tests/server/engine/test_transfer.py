from __future__ import annotations

import math

import torch

from server.engine.transfer import Download, pack, resolve, unpack


def test_negative_ids_become_the_sampled_tokens() -> None:
    tokens, prev_tokens = torch.tensor([5, -1, 7, -3, -1]), torch.tensor([40, 41, 42])
    assert resolve(tokens, prev_tokens).tolist() == [5, 40, 7, 42, 40]
    assert resolve(tokens[:1], None).tolist() == [5]
    assert tokens.tolist() == [5, -1, 7, -3, -1]


def test_tensors_sent_in_one_row_arrive_unchanged() -> None:
    tensors = [
        torch.tensor([0, 151_936, 2**40]),
        torch.tensor([[0.1, -math.inf], [math.inf, 1e-45]]),
        torch.tensor([True, False]),
        torch.empty(0, 3),
    ]
    arrived = unpack(pack(tensors), tensors)
    for before, after in zip(tensors, arrived, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    nan = [torch.tensor([math.nan])]
    assert math.isnan(unpack(pack(nan), nan)[0].item())


def test_on_a_cpu_nothing_is_copied() -> None:
    tensors = [torch.tensor([1, 2]), torch.tensor([0.5])]
    assert all(a is b for a, b in zip(Download(tensors).wait(), tensors, strict=True))
