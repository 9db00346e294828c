"""Copying adapters to a real GPU while it computes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.artifact import Adapter, AdapterInfo, Adjustment, Extras, LoraWeights
from adapters.kernels import Segment, choose
from adapters.kernels.reference import reference_lora
from adapters.pool.packed import nbytes_of
from adapters.pool.rank_pool import RankPool
from adapters.registry import Version
from adapters.residency import Residency
from adapters.sites import Site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SITES = {"q": Site("q", 128, 256), "down": Site("down", 256, 128)}
RANK, DTYPE = 16, torch.bfloat16


def _adapter(number: int) -> Adapter:
    generator = torch.Generator().manual_seed(number)
    weights = {
        name: LoraWeights(
            *(
                torch.randn(RANK, n, generator=generator).to(DTYPE)
                for n in (site.in_features, site.out_features)
            )
        )
        for name, site in SITES.items()
    }
    shift = torch.randn(256, generator=generator)
    extras = Extras({"q": Adjustment(None, shift)} if number % 2 else {})
    info = AdapterInfo(f"digest{number}", dict.fromkeys(SITES, RANK), nbytes_of(weights), None, ())
    return Adapter(info, weights, extras)


def test_copies_are_complete_and_do_not_wait_for_a_busy_stream() -> None:
    """There are more adapters than initial slots, so tables grow. Some reuse the rows of evicted adapters."""
    cuda: Any = torch.cuda
    device = torch.device("cuda", 0)
    adapters = {f"digest{i}": _adapter(i) for i in range(40)}
    pools = [RankPool(SITES, 24 * RANK, DTYPE, where) for where in (device, "cpu")]
    load = lambda version: adapters[version.digest]  # noqa: E731
    residencies = [Residency(pool, load, 1 << 20) for pool in pools]
    kernel = choose(device, DTYPE)
    x, y = torch.randn(1, 128).to(DTYPE), torch.randn(1, 256).to(DTYPE)
    for number in range(40):
        busy = 0 < number < 4  # the first one loads CUDA's own code
        if busy:
            cuda._sleep(1 << 30)  # at least half a second
        asleep = cuda.Event()
        asleep.record()
        slots = [_pin(residency, adapters[f"digest{number}"].info) for residency in residencies]
        assert not (busy and asleep.query()), "the copy waited for the steps' stream"
        expected = y.clone()
        reference_lora(expected, x, pools[1].sites["q"], [Segment(slots[1], 0, 1)])
        got = y.to(device)
        kernel(got, x.to(device), pools[0].sites["q"], [Segment(slots[0], 0, 1)])
        torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=0.03, atol=0.1)
        for residency in residencies:
            residency.unpin(f"digest{number}")
    assert residencies[0].stats.evictions > 0
    for residency in residencies:
        residency.close()


def _pin(residency: Residency, info: AdapterInfo) -> int:
    version = Version(info.digest, info.digest, Path(info.digest), info, 0.0)
    for _ in range(100_000):
        slot = residency.pin(version)
        if slot is not None:
            return slot
        time.sleep(0.0001)
    raise AssertionError("it does not become resident")
