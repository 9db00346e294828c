"""How the attention calls of a model get their layer numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.engine.attention import MAX_LAYERS, AttentionHost, AttentionSpec


def test_a_layer_that_attends_again_has_separate_keys() -> None:
    host, numbers = AttentionHost(), []

    def attend(layer: int, q: Tensor, _: Tensor, __: Tensor, ___: AttentionSpec) -> Tensor:
        numbers.append(layer)
        return q

    host.handler = attend
    q = torch.zeros(1, 2, 5, 8)
    modules = [nn.Module(), nn.Module()]
    for layer, module in enumerate(modules):
        module.layer_idx = layer  # type: ignore[assignment]
    for _ in range(2):
        host.begin()
        for module in (modules[0], modules[1], modules[0], modules[0]):
            host(module, q, q, q, attention_mask=None)
    assert numbers == 2 * [0, 1, MAX_LAYERS, 2 * MAX_LAYERS]
