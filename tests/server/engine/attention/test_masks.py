"""The windows of a model's layers, found from transformers' mask functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from adapters.errors import BaseModelError
from server.engine.attention import AttentionHost
from server.engine.attention.masks import MaskReader, window_of


@pytest.mark.parametrize("longest", [1, 2, 5, 64, 4097])
def test_causal_attention_has_no_window(longest: int) -> None:
    assert window_of(causal_mask_function, longest) is None


@pytest.mark.parametrize("window", [1, 2, 16, 511, 4095])
def test_a_sliding_window_is_found_without_its_mask(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window), 4096) == window


@pytest.mark.parametrize("window", [64, 65, 1000])
def test_a_window_as_long_as_the_longest_sequence_is_no_window(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window), 64) is None


def _first_token_too(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key == 0) & (query >= 0)


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        sliding_window_bidirectional_mask_function(16),
        chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long)),
        chunked_causal_mask_function(1000, torch.zeros(1, dtype=torch.long)),
        or_masks(sliding_window_causal_mask_function(16), _first_token_too),
    ],
)
def test_other_masks_are_refused(function: Any) -> None:
    with pytest.raises(BaseModelError, match="neither causal nor that of a sliding window"):
        window_of(function, 4096)


def _mask_of(reader: MaskReader, function: Any = causal_mask_function) -> Tensor:
    return reader(
        batch_size=1,
        q_length=5,
        kv_length=5,
        mask_function=function,
        dtype=torch.bfloat16,
        device="cpu",
        allow_is_bidirectional_skip=True,
    )


def test_the_window_of_a_layers_mask_overrides_the_one_in_its_config() -> None:
    reader = MaskReader(64)
    full, sliding = _mask_of(reader), _mask_of(reader, sliding_window_causal_mask_function(16))
    assert reader.window(full, 8) is None
    assert reader.window(sliding, None) == 16
    assert reader.window(sliding[:, :, :, :5], None) == 16
    assert reader.window(None, 8) == 8


def test_a_mask_is_checked_only_if_a_layer_uses_it() -> None:
    reader = MaskReader(64)
    mask = _mask_of(reader, bidirectional_mask_function)
    with pytest.raises(BaseModelError, match="neither"):
        reader.window(mask, None)


def test_a_mask_that_the_model_makes_itself_is_refused() -> None:
    reader = MaskReader(64)
    _mask_of(reader)
    with pytest.raises(BaseModelError, match="a mask of its own"):
        reader.window(torch.ones(1, 1, 5, 5).tril().bool(), None)


def test_a_mask_after_the_probe_is_refused() -> None:
    host = AttentionHost()
    host.handler = lambda *_: torch.zeros(5, 2, 8)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(BaseModelError, match="a mask of its own"):
        host(module, q, q, q, attention_mask=torch.zeros(1, 1, 5, 5))


def test_a_mask_that_depends_on_the_steps_tokens_has_the_steps_window() -> None:
    """Masks for the images of a prompt are like this."""
    groups = torch.tensor([[-1, -1, -1, -1, -1]])

    def same_group(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (groups[batch, query] == groups[batch, key]) & (groups[batch, query] >= 0)

    reader = MaskReader(64)
    mask = _mask_of(reader, or_masks(causal_mask_function, and_masks(same_group)))
    assert reader.window(mask, 8) == 8


def test_the_host_keeps_the_windows_for_later_steps_that_have_no_masks() -> None:
    host, windows = AttentionHost(), []

    def attend(_: int, q: Tensor, __: Tensor, ___: Tensor, spec: Any) -> Tensor:
        windows.append(spec.window)
        return q

    host.handler, host.masks = attend, MaskReader(64)
    mask = _mask_of(host.masks, sliding_window_causal_mask_function(16))
    module = torch.nn.Module()
    module.layer_idx = 3  # type: ignore[assignment]
    q = k = v = torch.zeros(1, 2, 5, 8)
    host.begin()
    host(module, q, k, v, attention_mask=mask)
    host.masks = None
    host.begin()
    host(module, q, k, v, attention_mask=None)
    assert windows == [16, 16]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phimoe"])
def test_the_default_windows_of_published_families_fit(family: str) -> None:
    window = AutoConfig.for_model(family).sliding_window
    assert window is None or window_of(sliding_window_causal_mask_function(window), 1 << 18) == window
