"""The native product with NF4 experts equals the loop that dequantises each expert."""

from __future__ import annotations

import pytest
import torch

from adapters.base.experts import MATRICES, SCALES, Nf4Experts, quantize
from adapters.base.panels import pack_panels, unpack_panels
from tests.support.native_kernels import ISAS, threads, using
from tests.support.tiny_configs import tiny_config

EXPERTS, HIDDEN, INNER = 6, 128, 192


@pytest.fixture(scope="module")
def usual() -> Nf4Experts:
    return _experts()


@pytest.fixture(scope="module")
def packed() -> Nf4Experts:
    experts = _experts()
    experts.pack()
    return experts


def _experts() -> Nf4Experts:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = tiny_config(
        "qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INNER, num_local_experts=EXPERTS
    )
    with torch.device("meta"):
        experts = Nf4Experts(Qwen3MoeExperts(config))
    generator = torch.Generator().manual_seed(0)
    for name, (outputs, inputs) in experts.shapes.items():
        weights = torch.randn(EXPERTS, outputs, inputs, generator=generator).bfloat16() / inputs**0.5
        for attribute, value in zip((name, name + SCALES), quantize(weights), strict=True):
            setattr(experts, attribute, value)
    return experts


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counts", [[1, 0, 0, 0, 0, 0], [0, 3, 1, 0, 40, 9], [2, 2, 2, 2, 2, 2], [0] * 6])
def test_it_equals_the_loop_and_each_row_alone(
    isa: str, counts: list[int], usual: Nf4Experts, packed: Nf4Experts
) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    for name in MATRICES:
        x = torch.randn(sum(counts), usual.shapes[name][1], generator=generator).bfloat16()
        expected = usual.product(name, x, counts)
        with using(isa), threads(2):
            ours = packed.product(name, x, counts)
            owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
            for row, owner in enumerate(owners):
                one = [int(expert == owner) for expert in range(EXPERTS)]
                assert torch.equal(packed.product(name, x[row : row + 1], one)[0], ours[row])
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_packing_keeps_each_weight(usual: Nf4Experts, packed: Nf4Experts) -> None:
    for name in MATRICES:
        assert torch.equal(unpack_panels(pack_panels(getattr(usual, name)[1])), getattr(usual, name)[1])
        for expert in range(EXPERTS):
            assert torch.equal(packed.dense(name, expert), usual.dense(name, expert))


def test_packed_experts_still_have_gradients(usual: Nf4Experts, packed: Nf4Experts) -> None:
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    gradients = []
    for experts in (usual, packed):
        leaf = x.clone().requires_grad_()
        experts.product("gate_up_proj", leaf, [1] * 6).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
