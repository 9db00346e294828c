"""Packed adapters, written by one scatter for each row width, as on a GPU. These tests run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.pool.packed import PackedWeights, nbytes_of, packed
from adapters.pool.rank_pool import RankPool
from adapters.sites import Site
from adapters.transfer import ALIGNMENT, host_memory, joined, send_coalesced

SITES = {
    "q": Site("q", 12, 20),
    "k": Site("k", 12, 12),
    "down": Site("down", 20, 12),
    "odd": Site("odd", 7, 3),
}
CPU = torch.device("cpu")


def _adapter(ranks: dict[str, int]) -> Adapter:
    weights = {
        name: LoraWeights(
            torch.randn(rank, SITES[name].in_features), torch.randn(rank, SITES[name].out_features)
        )
        for name, rank in ranks.items()
    }
    return Adapter(AdapterInfo(str(ranks), ranks, nbytes_of(weights), None, ()), weights)


def _rows_of(pool: RankPool, slot: int) -> dict[str, list[Tensor]]:
    """The slot's rows of A and B at each site, as a kernel reads them."""
    sites = {name: site for name, site in pool.sites.items() if slot in site.rows}
    return {name: [site.a[site.rows[slot]], site.b[site.rows[slot]]] for name, site in sites.items()}


def test_pairs_are_views_of_one_memory_with_rows_of_equal_width_together() -> None:
    adapter = _adapter({"q": 2, "down": 3, "odd": 1})
    memory = torch.zeros(nbytes_of(adapter.weights), dtype=torch.uint8)
    got = packed(adapter, memory).weights
    assert isinstance(got, PackedWeights)
    assert {width: tuple(rows.shape) for width, rows in got.rows.items()} == {
        12: (2 + 3, 12),
        20: (2 + 3, 20),
        7: (1, 7),
        3: (1, 3),
    }
    assert list(got) == list(adapter.weights)
    assert len(got) == 3
    for name, pair in adapter.weights.items():
        assert torch.equal(got[name].a, pair.a)
        assert torch.equal(got[name].b, pair.b)
    first = got["q"].a[0, 0].item()
    memory.zero_()
    assert first != 0 == got["q"].a[0, 0].item(), "the views must use the given memory"


def test_an_adapter_without_pairs_can_be_packed() -> None:
    assert not packed(_adapter({})).weights


@pytest.mark.parametrize("staging", [0, 20 * 3])
def test_packed_rows_equal_rows_written_one_by_one(staging: int) -> None:
    """Contiguous and scattered rows, sites of all widths, with and without a staging buffer of three rows."""
    pools = [RankPool(SITES, 9, torch.float32) for _ in range(2)]
    pools[0]._store._staging = torch.empty(staging)
    for pool in pools:
        for name in ("a", "b", "c"):
            assert pool.reserve({"q": 1 + (name == "b"), "odd": 2}) is not None
        pool.free(1)
    for ranks in ({"q": 6, "k": 4, "odd": 3}, {"q": 1, "down": 9}):
        adapter = _adapter(ranks)
        slots = [pool.reserve(ranks) for pool in pools]
        assert slots[0] is not None
        assert slots[0] == slots[1]
        pools[0].write(slots[0], packed(adapter))
        pools[1].write(slots[0], adapter)
        got, expected = (_rows_of(pool, slots[0]) for pool in pools)
        assert got.keys() == expected.keys() == ranks.keys()
        for name in ranks:
            assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True))
        assert pools[0].sites["q"].record(slots[0])[1] == ranks["q"]
    assert any(isinstance(site.rows[1], Tensor) for site in pools[0].sites.values() if 1 in site.rows)


def test_joined_tensors_are_equal_and_aligned() -> None:
    for dtype in (torch.int32, torch.float32):
        tensors = [torch.arange(n).to(dtype) + n for n in (3, 4, 1, 0, 9)]
        moved = joined(tensors, CPU)
        assert all(torch.equal(a, b) for a, b in zip(moved, tensors, strict=True))
        assert not any(tensor.data_ptr() % ALIGNMENT for tensor in moved)
    assert [t.data_ptr() for t in send_coalesced(tensors, CPU)] == [t.data_ptr() for t in tensors], (
        "the CPU makes no copies"
    )


def test_memory_that_cannot_be_pinned_is_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = torch.empty

    def refusing(*size: int, pin_memory: bool = False, **others: Any) -> Any:
        if pin_memory:
            raise RuntimeError("no more pages may be locked\nand a trace")
        return real(*size, **others)

    monkeypatch.setattr(torch, "empty", refusing)
    for _ in range(2):
        assert host_memory(3, torch.int64, torch.device("cuda")).shape == (3,)
    (record,) = caplog.records
    assert record.message.endswith("no more pages may be locked")
