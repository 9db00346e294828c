"""Which FlashAttention-2 a model on a GPU uses. torch's gets the arguments that our own attention means."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from adapters.training import flash
from adapters.training.attention import packed_attention
from adapters.training.flash import use_flash_attention, varlen_attention
from adapters.training.packing import collate
from tests.adapters.training.examples import example
from tests.support.tiny_models import TinyBase

A100 = (8, 0)


def model(default: str = "sdpa", supports: bool = True, allowed: Any = None, **config: Any) -> Any:
    """The parts of a transformers model that the choice reads."""
    sizes = {"head_dim": 128, "hidden_size": 512, "num_attention_heads": 4, "attention_dropout": 0.0}
    text = SimpleNamespace(_attn_implementation=default, **(sizes | config))
    made = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        _supports_flash_attn=supports,
        _compatible_flash_implementations=allowed,
    )
    made.set_attn_implementation = lambda name: setattr(text, "_attn_implementation", name)
    return made


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that flash-attn is installed."""
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))


def chosen(made: Any, capability: tuple[int, int] = A100) -> tuple[str, str]:
    reason = use_flash_attention(made, capability)
    return made.config.get_text_config()._attn_implementation, reason


@pytest.mark.usefixtures("package")
def test_the_package_is_used_if_it_is_installed() -> None:
    for made in (model(), model(head_dim=None), model("eager", head_dim=256), model(attention_dropout=0.1)):
        assert chosen(made)[0] == "flash_attention_2"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("made", [model(supports=False), model(allowed=["flash_attention_3"])])
def test_a_model_without_support_for_the_package_uses_torchs_own(made: Any) -> None:
    assert chosen(made)[0] == flash.TORCH


def test_without_the_package_torchs_own_is_used() -> None:
    name, reason = chosen(model())
    assert name == flash.TORCH
    assert "torch's own" in reason


def test_a_package_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    assert chosen(model())[0] == flash.TORCH
    assert "flash-attn cannot be imported" in chosen(model(head_dim=256))[1]


@pytest.mark.parametrize(
    ("made", "capability", "reason"),
    [
        (model(), (7, 5), "compute capability 8.0, and this GPU has 7.5"),
        (model(head_dim=100), A100, "a multiple of 8 up to 192, and this base has 100"),
        (model(head_dim=256), A100, "this base has 256"),
        (model("eager"), A100, "flash-attn is not installed, and .* attention uses features that"),
        (model(attention_dropout=0.1), A100, "features that torch's FlashAttention-2 lacks"),
        (model(v_head_dim=64), A100, "different dimensions"),
    ],
)
def test_otherwise_the_models_attention_is_unchanged(
    made: Any, capability: tuple[int, int], reason: str
) -> None:
    before = made.config.get_text_config()._attn_implementation
    name, said = chosen(made, capability)
    assert name == before
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn as its documentation describes it. q is [tokens, heads, dim]."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert longest_q == longest_k == int(bounds_q.diff().max())
    assert enable_gqa or q.shape[1] == k.shape[1]
    left, right = window_size
    place = torch.arange(q.shape[0])
    owner = torch.bucketize(place, bounds_q[1:].long(), right=True)
    back = place[:, None] - place
    seen = (owner[:, None] == owner) & (-back <= right)
    if left >= 0:
        seen &= back <= left
    by_head, keys, values = (states.transpose(0, 1)[None] for states in (q, k, v))
    out = scaled_dot_product_attention(by_head, keys, values, seen, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("options", [("window_size", "enable_gqa"), ("window_size",)])
def test_torchs_kernel_computes_what_our_own_attention_computes(
    monkeypatch: pytest.MonkeyPatch, window: int | None, options: Sequence[str]
) -> None:
    """Also with a version of torch whose kernel has no parameter for grouped heads."""
    monkeypatch.setattr(flash, "varlen_attn", reference)
    monkeypatch.setattr(flash, "_VARLEN_OPTIONS", frozenset(options))
    batch = collate([[example(12, 0), example(1, 1)], [example(5, 2)]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 18, 8, generator=generator) for heads in (6, 2, 2))
    asked = {name: batch[name] for name in ("cu_seq_lens_q", "max_length_q")}
    theirs, _ = varlen_attention(None, q, k, v, None, scaling=0.3, sliding_window=window, **asked)
    ours, _ = packed_attention(None, q, k, v, None, 0.3, 0.0, window, batch["cu_seq_lens_q"])
    torch.testing.assert_close(theirs, ours)


def test_a_whole_model_uses_torchs_kernel(tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers passes the bounds of the batch's rows and makes no mask."""
    monkeypatch.setattr(flash, "varlen_attn", reference)
    base = tiny_base("qwen3").model
    before = base.config._attn_implementation
    batch = collate([[example(20, 3), example(7, 4)]])
    with torch.no_grad():
        masked = base(**batch, use_cache=False).loss
        try:
            assert "torch's own" in use_flash_attention(base, A100)
            flashed = base(**batch, use_cache=False).loss
        finally:
            base.set_attn_implementation(before)
    assert flashed.item() == pytest.approx(masked.item(), rel=1e-2)
