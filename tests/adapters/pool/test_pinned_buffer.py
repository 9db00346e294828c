from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.pool.pinned_buffer import PinnedBuffer, pinned_buffer


def _pinned(units: int) -> PinnedBuffer:
    return PinnedBuffer(torch.zeros(units * 256, dtype=torch.uint8))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), max_size=40))
def test_ranges_never_overlap_and_all_come_back(history: list[tuple[bool, int]]) -> None:
    pinned = _pinned(16)
    live: dict[str, torch.Tensor] = {}
    for i, (give, size) in enumerate(history):
        if give and live:
            owner = sorted(live)[size % len(live)]
            pinned.free(owner)
            del live[owner]
        elif (memory := pinned.allocate(str(i), size)) is not None:
            assert memory.nbytes == size
            memory.fill_(i)
            live[str(i)] = memory
        pinned.check_integrity()
    assert all((memory == int(owner)).all() for owner, memory in live.items()), "two owners share memory"
    for owner in live:
        pinned.free(owner)
    pinned.check_integrity()
    assert pinned.allocate("everything", 16 * 256) is not None


def test_a_size_without_a_contiguous_range_gets_no_memory() -> None:
    pinned = _pinned(3)
    for owner in "abc":
        pinned.allocate(owner, 256)
    for owner in "ac":
        pinned.free(owner)
    assert pinned.allocate("d", 257) is None
    pinned.free("b")
    assert pinned.allocate("d", 768) is not None
    pinned.free("nobody")
    pinned.check_integrity()


def test_only_a_gpu_gets_a_pinned_buffer() -> None:
    assert pinned_buffer(1 << 20, torch.device("cpu")) is None


def test_without_permission_to_pin_adapters_use_pageable_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    for _ in range(2):
        assert pinned_buffer(1 << 20, torch.device("cuda")) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be pinned" in caplog.text
