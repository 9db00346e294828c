"""Examples in a pack do not attend to each other. The loss covers exactly the assistant's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from adapters.base import load_base, prepare_base
from adapters.base.unpack import unpack_weights
from adapters.training import attention
from adapters.training.attention import packed_attention, use_packed_attention
from adapters.training.packing import collate, pack
from tests.adapters.training.examples import example
from tests.support.tiny_models import FAMILIES, Family, TinyBase, make_tiny_model


def test_packs_hold_every_example_once_and_at_most_the_limit() -> None:
    examples = [example(length, length) for length in (9, 30, 4, 17, 17, 25, 2, 11)]
    packs = pack(examples, 32)
    assert all(sum(len(one.ids) for one in group) <= 32 for group in packs)
    assert sorted(id(one) for group in packs for one in group) == sorted(map(id, examples))
    assert len(packs) == 4  # 115 tokens in packs of 32


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_logits_and_loss_of_single_ones(tiny_base: TinyBase, family: Family) -> None:
    """Includes a window shorter than the examples (Mistral) and capped scores (Gemma 2)."""
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
    """In float32, with grouped heads. ``long`` chooses one of the two implementations."""
    monkeypatch.setattr(attention, "_LONG", long)
    ends = [0, 1, 13, 18]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, ends[-1], 8, generator=generator).requires_grad_() for heads in (6, 2, 2)
    )
    bounds = torch.tensor(ends)
    ours, _ = packed_attention(None, q, k, v, None, 0.3, 0.0, window, bounds)
    place = torch.arange(ends[-1])
    owner = torch.bucketize(place, bounds[1:], right=True)
    back = place[:, None] - place
    seen = (owner[:, None] == owner) & (back >= 0) & (back < (window or ends[-1]))
    theirs = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, generator=generator)
    got, wanted = (torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, theirs))
    torch.testing.assert_close(got, wanted)


def test_unpacked_weights_give_the_same_bits(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2", tmp_path / "base")
    prepared = prepare_base(str(folder), tmp_path / "home", head_quantization="nf4", progress=False)
    batch = collate([[example(20, 1)]])
    losses = []
    for unpacked in (False, True):
        model = load_base(
            prepared
        ).model.train()  # in evaluation mode bitsandbytes uses another path on a CPU
        if unpacked:
            unpack_weights(model)
        inputs = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        loss = model(inputs_embeds=inputs, **rest, use_cache=False).loss
        losses.append((loss.item(), torch.autograd.grad(loss, inputs)[0]))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
