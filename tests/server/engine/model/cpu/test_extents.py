"""A call that would access memory outside its tensors is refused. The native kernels do not check this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from adapters.base import load_base, prepare_base
from adapters.kernels import LoraKernel, Segment
from adapters.kernels.cpu import isa, library
from adapters.kernels.cpu.lora import NativeLora
from adapters.kernels.reference import reference_lora
from adapters.kernels.segmented import segmented_lora
from adapters.pool.rank_pool import RankPool
from adapters.pool.site_pool import lone_pool
from adapters.sites import Site
from server.engine.attention import AttentionSpec, KvShape
from server.engine.attention.native_paged import NativePaged
from server.engine.model.cpu.model import CpuModel
from server.engine.model.made_up import made_up_prompt
from server.engine.model.transformers_model import TransformersModel
from tests.support.tiny_models import make_tiny_model

CPU = torch.device("cpu")
BF16 = torch.bfloat16
NATIVE = pytest.mark.skipif(library() is None, reason="the native kernels are not built")


def _kernels() -> list[LoraKernel]:
    loaded = library()
    return [reference_lora, segmented_lora, *([NativeLora(loaded)] if loaded is not None else [])]


@pytest.mark.parametrize("kernel", _kernels())
@pytest.mark.parametrize(
    ("y", "x", "stop"),
    [
        ((3, 32), (3, 64), 4),  # a segment longer than the rows
        ((3, 32), (4, 64), 3),  # fewer rows of y
        ((4, 32), (3, 64), 3),
        ((3, 16), (3, 64), 3),  # narrower than the site
        ((3, 32), (3, 32), 3),
    ],
)
def test_lora(kernel: LoraKernel, y: tuple[int, int], x: tuple[int, int], stop: int) -> None:
    pool = lone_pool(Site("site", 64, 32), 8, BF16, CPU)
    out = torch.ones(y, dtype=BF16)
    with pytest.raises(ValueError, match="LoRA on x"):
        kernel(out, torch.ones(x, dtype=BF16), pool, [Segment(0, 0, 1), Segment(1, 1, stop)])
    assert (out == 1).all()


@NATIVE
@pytest.mark.parametrize(
    "shapes",
    [
        {"q": (4, 4, 16)},
        {"q": (6, 4, 16), "k": (6, 2, 16), "v": (6, 2, 16)},  # more rows than the step has
        {"k": (5, 4, 16)},
        {"v": (5, 2, 32)},
        {"q": (5, 3, 16)},  # heads that do not share evenly
        {"q": (5, 4, 32)},
    ],
)
def test_attention(shapes: dict[str, tuple[int, ...]]) -> None:
    loaded = library()
    assert loaded is not None
    paged = NativePaged(loaded, 16)
    paged.allocate({0: KvShape(2, 16, 16)}, 2)
    paged.begin([made_up_prompt(CONFIG, 5, 16)])
    right = {"q": (5, 4, 16), "k": (5, 2, 16), "v": (5, 2, 16)}

    def attend(shapes: dict[str, tuple[int, ...]]) -> Tensor:
        q, k, v = (torch.zeros(shape, dtype=BF16) for shape in (right | shapes).values())
        return paged(0, q, k, v, AttentionSpec(0.25))

    assert attend({}).shape == right["q"]
    with pytest.raises(ValueError, match="layer 0 attends with"):
        attend(shapes)


CONFIG = AutoConfig.for_model("llama", max_position_embeddings=64, vocab_size=100)


@NATIVE
def test_a_sequence_longer_than_its_blocks() -> None:
    loaded = library()
    assert loaded is not None
    prompt = made_up_prompt(CONFIG, 20, 16)
    assert prompt.sequence.table is not None
    prompt.sequence.table.blocks.pop()
    with pytest.raises(ValueError, match="20 tokens has KV blocks for 16"):
        NativePaged(loaded, 16).begin([prompt])


@pytest.mark.skipif(isa() != "avx512bf16", reason="the fused step does not run on this machine")
def test_the_fused_step(tmp_path: Path) -> None:
    base = load_base(
        prepare_base(str(make_tiny_model("llama", tmp_path / "model")), tmp_path, progress=False)
    )
    pool = RankPool(base.layout.sites, 4, BF16)
    model = CpuModel(TransformersModel(base, pool), pool, max_tokens=20)
    model.allocate(4, 16)
    config: Any = base.model.config
    step = [made_up_prompt(config, 20, 16)]
    assert model(step).shape[0] == 1
    with pytest.raises(ValueError, match="a step of 21 tokens"):
        model([made_up_prompt(config, 21, 16)])
    for rows in ([20], [-1], [0, 500]):
        with pytest.raises(ValueError, match="rows outside the step's 20 tokens"):
            model(step, torch.tensor(rows))
