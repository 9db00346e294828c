"""The bytes of a base's weights, in 4 bits and not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from adapters.base import LoadedBase, Quantization, load_base, prepare_base
from adapters.base.weight_bytes import count_weight_bytes, log_weight_bytes
from tests.support.tiny_models import VOCAB_SIZE, Family, TinyBase, make_tiny_model


def _load(family: str, home: Path, quantization: Quantization) -> LoadedBase:
    return load_base(
        prepare_base(str(make_tiny_model(family, home / family)), home, quantization, progress=False)
    )


@pytest.mark.parametrize(("family", "matrices"), [("llama", 2), ("gemma", 1)])  # gemma's head is tied
def test_linears_count_with_their_scales_and_the_rest_counts_once(
    family: Family, matrices: int, tiny_base: TinyBase
) -> None:
    base = tiny_base(family)
    found = count_weight_bytes(base.model)
    weights = sum(site.in_features * site.out_features for site in base.layout.sites.values())
    assert weights / 2 * 1.01 < found.four_bit < weights / 2 * 1.13
    hidden, norms = base.model.config.hidden_size, 2 * base.model.config.num_hidden_layers + 1
    assert found.dense == 2 * hidden * (matrices * VOCAB_SIZE + norms)
    assert found.dense_experts == 0


def test_an_unquantised_base_has_only_dense_weights(tmp_path: Path) -> None:
    base = _load("llama", tmp_path, "none")
    found = count_weight_bytes(base.model)
    assert (found.four_bit, found.dense) == (0, sum(p.nbytes for p in base.model.parameters()))


def test_experts_that_stay_in_bf16_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = count_weight_bytes(_load("gpt_oss", tmp_path, "nf4").model)
    assert found.dense_experts > 0.5 * found.dense
    log_weight_bytes(found, "nf4")
    assert "experts in bf16: 4 bits are not supported for GptOssExperts" in caplog.text
