"""No example sees another, and the loss asks for exactly the assistant's tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from adapters.training import attention
from adapters.training.attention import packed_attention, use_packed_attention
from adapters.training.encode import Example
from adapters.training.packing import collate, pack
from adapters.training.unpack import unpack_linears
from tests.conftest import TinyBase
from tests.tiny_models import FAMILIES, VOCAB_SIZE, Family


def example(length: int, seed: int) -> Example:
    """Random tokens, of which the last third is learnt."""
    draw = random.Random(seed)
    ids = [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]
    return Example(ids, [place >= length * 2 // 3 for place in range(length)])


def test_packs_hold_everything_once_and_never_too_much() -> None:
    examples = [example(length, length) for length in (9, 30, 4, 17, 17, 25, 2, 11)]
    packs = pack(examples, 32)
    assert all(sum(len(one.ids) for one in group) <= 32 for group in packs)
    assert sorted(id(one) for group in packs for one in group) == sorted(map(id, examples))
    assert len(packs) == 4  # 115 tokens in packs of 32


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_logits_and_loss_of_single_ones(tiny_base: TinyBase, family: Family) -> None:
    """Also with a window shorter than the examples (Mistral), and scores that are capped (Gemma 2)."""
    model = tiny_base(family).model
    examples = [example(length, length) for length in (20, 5, 33)]
    before = model.config._attn_implementation
    use_packed_attention(model)
    try:
        batch = collate([examples[:2], examples[2:]])
        with torch.no_grad():
            packed = model(**batch, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    singles, targets = [], []
    for one in examples:
        with torch.no_grad():
            logits = model(torch.tensor([one.ids]), use_cache=False).logits[0]
        learnt = [place for place, flag in enumerate(one.learnt) if flag]
        singles.append(logits[[place - 1 for place in learnt]])
        targets += [one.ids[place] for place in learnt]
    expected = torch.cat(singles).float()
    assert batch["labels"][0].tolist() == targets
    torch.testing.assert_close(packed.logits[0].float(), expected, atol=0.06, rtol=0.03)
    loss = cross_entropy(expected, torch.tensor(targets))
    assert packed.loss.item() == pytest.approx(loss.item(), rel=2e-2)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("long", [2, 1024])
def test_attention_and_its_gradients_equal_torchs(
    monkeypatch: pytest.MonkeyPatch, window: int | None, long: int
) -> None:
    """In float32, with grouped heads; ``long`` chooses which of the two ways is gone."""
    monkeypatch.setattr(attention, "_LONG", long)
    lengths = (1, 12, 5)
    total = sum(lengths)
    torch.manual_seed(0)
    shapes = ((6, total, 8), (2, total, 8), (2, total, 8))
    ours, theirs = ([torch.randn(1, *shape) for shape in shapes] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        other.copy_(one)
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
    ends = torch.tensor([0, 1, 13, 18])
    got, _ = packed_attention(None, *ours, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=ends)
    seen = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool().tril()
    seen = seen if window is None else seen.triu(1 - window)
    wanted = scaled_dot_product_attention(*theirs, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn(got.shape)
    for out in (got, wanted):
        (out * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_unpacked_weights_give_the_same_numbers_to_the_bit(tmp_path: Any) -> None:
    from adapters.base import load_base, prepare_base
    from tests.tiny_models import make_tiny_model

    prepared = prepare_base(
        str(make_tiny_model("qwen2", tmp_path / "base")), tmp_path / "home", progress=False
    )
    batch = collate([[example(20, 1)]])
    losses = []
    for unpacked in (False, True):
        model = load_base(prepared).model.train()  # in evaluation, bitsandbytes goes another way on a CPU
        if unpacked:
            unpack_linears(model)
        inputs = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        loss = model(inputs_embeds=inputs, **rest, use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), inputs.grad))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
