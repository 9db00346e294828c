"""Which attention is chosen. The builds of flash attention are fakes."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.attention import AttentionSpec, KvShape, choice
from server.engine.attention.choice import BUILDS, Build, choose, first_fit, preferred_block_size
from server.engine.attention.flash_metadata import FlashMetadata
from server.engine.attention.flash_paged import FlashPaged
from server.engine.attention.reference import ReferencePaged
from server.engine.attention.torch_paged import TorchPaged

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE, PLAIN, CAPPED = KvShape(2, 64, 64), AttentionSpec(0.125), AttentionSpec(0.125, softcap=30.0)


def missing() -> ReferencePaged:
    raise ImportError("No module named 'it'")


class Wrong(ReferencePaged):
    """A kernel whose sequences are one token too short, so its mask is wrong."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        return super().__call__(q, keys, values, replace(metadata, lengths=metadata.lengths - 1), spec)


class Failing:
    name = "failing"

    def __call__(self, *_: Any) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")


def build(load: Any = ReferencePaged, page: int = 16, suits: int = 16, softcap: bool = True) -> Build:
    return Build("it", load, page, suits, softcap)


def why_not(caplog: pytest.LogCaptureFixture, wanted: Build, **changed: Any) -> str:
    """The reason that is logged when ``wanted`` is not used."""
    case: dict[str, Any] = {"shape": SHAPE, "spec": PLAIN, "block": 32, "dtype": torch.bfloat16} | changed
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "manylora.engine"):
        shapes, specs = {0: SHAPE, 1: case["shape"]}, {0: PLAIN, 1: case["spec"]}
        found = first_fit([wanted], shapes, specs, case["block"], CPU, case["dtype"])
    assert found is None
    (record,) = caplog.records
    return record.getMessage().removeprefix("attention without it: ")


def test_why_a_build_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    reasons = []
    for wanted, changed in (
        (build(missing), {}),
        (build(Failing), {}),
        (build(), {"dtype": torch.float32}),
        (build(), {"shape": KvShape(2, 64, 32)}),
        (build(), {"shape": KvShape(2, 20, 20)}),
        (build(), {"shape": KvShape(2, 512, 512)}),
        (build(softcap=False), {"spec": CAPPED}),
        (build(page=256), {}),
    ):
        reasons.append(why_not(caplog, wanted, **changed))
        caplog.clear()
    assert reasons == [
        "it is not installed (No module named 'it')",
        "it fails: no kernel image",
        "the model computes in torch.float32, not in 16 bits",
        "keys have 64 dimensions and values 32",
        "heads of 20 dimensions are not a multiple of 8 up to 256",
        "heads of 512 dimensions are not a multiple of 8 up to 256",
        "it has no soft cap of scores, which this model needs",
        "a block holds 32 tokens, not a multiple of 256 (--block-size)",
    ]
    assert why_not(caplog, build(Wrong)).startswith("its results are wrong by")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake GPU on which every build passes the check."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(choice, "what_is_wrong", lambda *_: None)
    choice._load.cache_clear()


def chosen(spec: AttentionSpec, block_size: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return choose({0: SHAPE}, {0: spec}, block_size, GPU, dtype, max_length=100)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_gets_the_first_build_that_serves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = tuple(replace(wanted, load=ReferencePaged) for wanted in BUILDS)
    monkeypatch.setattr(choice, "BUILDS", builds)
    for absent, spec, block_size, expected in (
        (0, PLAIN, 256, 0), (1, PLAIN, 512, 1), (1, CAPPED, 256, 2), (0, PLAIN, 16, 2), (2, PLAIN, 64, 2),
    ):  # fmt: skip
        monkeypatch.setattr(choice, "BUILDS", builds[absent:])
        found = first_fit(choice.BUILDS, {0: SHAPE}, {0: spec}, block_size, GPU, torch.bfloat16)
        assert found is not None
        assert found[0] == builds[expected]
        assert type(chosen(spec, block_size)) is FlashPaged
    assert type(chosen(PLAIN, 256, torch.float32)) is TorchPaged
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    choice._load.cache_clear()
    assert type(chosen(PLAIN, 256)) is TorchPaged


@pytest.mark.usefixtures("gpu")
def test_the_block_size_suits_the_build_that_will_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = tuple(replace(wanted, load=ReferencePaged) for wanted in BUILDS)
    config = SimpleNamespace(num_attention_heads=4, hidden_size=256)
    capped = SimpleNamespace(**vars(config), head_dim=128, attn_logit_softcapping=50.0)
    for present, of, dtype, expected in (
        (builds, config, torch.bfloat16, 256), (builds, capped, torch.float16, 256),
        (builds[1:], config, torch.bfloat16, 256), (builds[1:], capped, torch.bfloat16, 64),
        (builds[2:], config, torch.bfloat16, 64), ((), config, torch.bfloat16, 16),
        (builds, config, torch.float32, 16),
    ):  # fmt: skip
        monkeypatch.setattr(choice, "BUILDS", present)
        assert preferred_block_size(of, GPU, dtype) == expected
    assert preferred_block_size(config, CPU, torch.bfloat16) == 16
