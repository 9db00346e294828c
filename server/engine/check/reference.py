"""What transformers itself computes for whole requests: one uncached forward pass each, nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapters.base.experts import computing_as_transformers
from adapters.base.implementations import implementations_of


@torch.inference_mode()
def uncached_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """float32 [tokens, vocabulary], on the host. Positions and masks are transformers' own."""
    ids = torch.tensor([list(tokens)], device=model.device)
    with computing_as_transformers(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()


@contextmanager
def attending_with(model: Any, implementation: str | dict[str, Any]) -> Iterator[None]:
    """While it lasts, the model attends with an implementation of transformers, not with the server's.

    Args:
        implementation: one for all parts of the model, or what ``implementations_of`` returned.
    """
    before = implementations_of(model.config)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
