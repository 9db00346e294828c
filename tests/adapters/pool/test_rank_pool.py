from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.artifact import Adapter, AdapterInfo, Adjustment, EmbeddingOrHead, Extras, LoraWeights
from adapters.kernels import LoraKernel, Segment
from adapters.kernels.cpu.lora import NativeLora
from adapters.kernels.reference import reference_lora
from adapters.kernels.segmented import segmented_lora
from adapters.pool.rank_pool import EXTRAS, RankPool
from adapters.pool.row_allocator import RowAllocator
from adapters.sites import Site
from tests.support.native_kernels import ISAS, using

SITES = {"q": Site("q", 12, 20), "down": Site("down", 20, 12)}


@contextmanager
def _kernel(backend: str) -> Iterator[LoraKernel]:
    """torch's kernel, or the native one in an instruction set. Skips if the CPU lacks the instruction set."""
    if backend == "segmented":
        yield segmented_lora
    else:
        with using(backend) as loaded:
            yield NativeLora(loaded)


def _adapter(ranks: dict[str, int], seed: int = 0, adjusts: str = "") -> Adapter:
    """``adjusts``: the vectors at the site "q": "scale", "shift" or both."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: LoraWeights(
            torch.randn(rank, SITES[name].in_features, generator=generator),
            torch.randn(rank, SITES[name].out_features, generator=generator),
        )
        for name, rank in ranks.items()
    }
    scale, shift = (
        torch.randn(SITES["q"].out_features, generator=generator) if which in adjusts else None
        for which in ("scale", "shift")
    )
    adjustments = {"q": Adjustment(scale, shift)} if adjusts else {}
    return Adapter(AdapterInfo(f"digest{seed}", ranks, 0, None, ()), weights, Extras(adjustments))


def _insert(pool: RankPool, adapter: Adapter) -> int:
    slot = pool.reserve(adapter.info.ranks)
    assert slot is not None
    pool.write(slot, adapter)
    return slot


def test_neighbouring_rows_are_preferred() -> None:
    rows = RowAllocator(8)
    first = rows.allocate(2)
    rows.allocate(1)
    assert first is not None
    rows.free(first)
    assert rows.allocate(3) == [3, 4, 5]
    assert rows.allocate(4) == [0, 1, 6, 7]
    assert rows.allocate(1) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_rows_never_leak(history: list[tuple[bool, int]]) -> None:
    rows = RowAllocator(16)
    owned: list[list[int]] = []
    for give, number in history:
        if give and owned:
            rows.free(owned.pop(number % len(owned)))
        elif (taken := rows.allocate(number)) is not None:
            assert len(taken) == number
            owned.append(taken)
        rows.check_integrity(owned)


def test_absent_sites_take_no_rows_and_ranks_are_not_padded() -> None:
    pool = RankPool(SITES, 8, torch.float32)
    _insert(pool, _adapter({"q": 5}))
    assert pool.rows_used == 5
    assert pool.missing({"q": 4, "down": 8}) == {"q": 1}
    assert pool.reserve({"q": 4}) is None
    assert pool.rows_used == 5
    pool.check_integrity()


def test_freed_rows_are_used_again() -> None:
    pool = RankPool(SITES, 8, torch.float32)
    slots = [_insert(pool, _adapter({"q": 4, "down": 2}, seed)) for seed in range(2)]
    pool.free(slots[0])
    assert _insert(pool, _adapter({"q": 4}, 2)) == slots[0]
    pool.free(slots[1])
    pool.free(slots[0])
    pool.check_integrity()
    assert pool.rows_used == 0


def test_every_site_has_a_rank_for_every_slot() -> None:
    """A kernel reads the rank of each slot at each site, also at sites that the slot's adapter lacks."""
    pool = RankPool(SITES, 40, torch.bfloat16)
    slots = [_insert(pool, _adapter({"q": 1}, seed)) for seed in range(40)]
    for site in pool.sites.values():
        ranks = ctypes.cast(site.native.ranks, ctypes.POINTER(ctypes.c_int32))
        known = len(site._tables[-1][1])
        assert known > max(slots)
        assert [ranks[slot] for slot in range(known)] == [len(site._lists.get(i, ())) for i in range(known)]


def _extras(seed: int) -> Extras:
    """Some of every kind of extras, chosen by ``seed``."""
    vector = torch.randn(12)
    matrix, pair = torch.randn(6, 12), LoraWeights(torch.randn(3, 12), torch.randn(3, 6))
    return Extras(
        {"q": Adjustment(torch.randn(20), None)} if seed % 2 else {},
        {"norm": {"weight": vector}} if seed % 3 else {},
        EmbeddingOrHead(
            matrix if seed % 5 else None, LoraWeights(torch.randn(2, 6), torch.randn(2, 12)), None
        ),
        EmbeddingOrHead(None, pair if seed % 7 else None, Adjustment(None, torch.randn(6)))
        if seed % 4
        else None,
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 400)), max_size=30))
def test_rows_and_extra_bytes_are_reserved_and_freed_together(
    history: list[tuple[bool, int, int]],
) -> None:
    pool = RankPool(SITES, 8, torch.float32, norms=["norm"], extra_bytes=1000)
    live: dict[int, tuple[int, int]] = {}
    for give, rank, nbytes in history:
        if give and live:
            slot = sorted(live)[rank % len(live)]
            pool.free(slot)
            del live[slot]
        else:
            needs = ({"q": rank} if rank else {}) | {EXTRAS: nbytes}
            fits = sum(r for r, _ in live.values()) + rank <= 8 and pool.extras.used + nbytes <= 1000
            new = pool.reserve(needs)
            assert (new is not None) == fits == (not pool.missing(needs) or new is not None)
            if new is not None:
                live[new] = (rank, nbytes)
                adapter = _adapter({"q": rank} if rank else {})
                pool.write(new, Adapter(adapter.info, adapter.weights, _extras(nbytes)))
        pool.check_integrity()
        assert pool.rows_used == sum(r for r, _ in live.values())
        assert pool.extras.used == sum(n for _, n in live.values())
    for slot in live:
        pool.free(slot)
    pool.check_integrity()
    assert pool.extras.used == pool.rows_used == 0
    assert not any(pool.extras.get(slot) for slot in range(40))


def test_native_kernels_find_a_norm_only_in_its_adapters_slot() -> None:
    pool = RankPool(SITES, 40, torch.float32, norms=["norm"], extra_bytes=1000)
    slots = [_insert(pool, _adapter({"q": 1}, seed)) for seed in range(20)]
    weight = torch.randn(12)
    pool.extras.write(slots[17], Extras(norms={"norm": {"weight": weight}}))
    cell = ctypes.c_void_p.from_address(pool.extras.norms["norm"].cell).value
    table = ctypes.cast(cell or 0, ctypes.POINTER(ctypes.c_void_p))
    assert [slot for slot in range(20) if table[slot]] == [slots[17]]
    found = ctypes.cast(table[slots[17]] or 0, ctypes.POINTER(ctypes.c_float))
    assert found[:12] == weight.tolist()
    pool.free(slots[17])
    assert not table[slots[17]]


def test_rows_that_were_never_written_can_be_freed() -> None:
    """This happens if reading the adapter fails after its rows were reserved."""
    pool = RankPool(SITES, 40, torch.bfloat16)
    slots = [pool.reserve({"q": 1}) for _ in range(40)]
    for slot in slots:
        assert slot is not None
        pool.free(slot)
    assert pool.rows_used == 0


def _check_each_token_alone(
    kernel: LoraKernel,
    got: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    pool: RankPool,
    segments: list[Segment],
) -> None:
    """Check that each token's result has the same bits when the token is alone in the step."""
    for slot, start, stop in segments:
        for t in range(start, stop):
            alone = y[t : t + 1].clone()
            kernel(alone, x[t : t + 1], pool.sites["q"], [Segment(slot, 0, 1)])
            assert torch.equal(alone[0], got[t])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 4)), min_size=1, max_size=8),
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["", "", "scale", "shift", "scale shift"])),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
@pytest.mark.parametrize("backend", ["segmented", *ISAS])
def test_every_kernel_equals_the_reference(
    backend: str, runs: list[tuple[int, int]], ranks: list[tuple[int, str]], dtype: torch.dtype, seed: int
) -> None:
    """Varies shared adapters, ranks (0 = no LoRA here), scales, shifts, scattered rows and base tokens."""
    dtype = dtype if backend == "segmented" else torch.bfloat16
    pool = RankPool(SITES, 40, dtype)
    torch.manual_seed(seed)
    fillers = [_insert(pool, _adapter({"q": 1 + i % 3})) for i in range(3)]
    slots = [
        _insert(pool, _adapter({"q": rank, "down": 1} if rank else {"down": 2}, i, adjusts))
        for i, (rank, adjusts) in enumerate(ranks[:3])
    ]
    for filler in fillers:
        pool.free(filler)  # leaves holes, so that the next adapters' rows are scattered
    slots += [
        _insert(pool, _adapter({"q": rank, "down": 1} if rank else {"down": 2}, i, adjusts))
        for i, (rank, adjusts) in enumerate(ranks[3:])
    ]
    segments, token = [], 0
    for slot, length in runs:
        if slot >= 0:
            segments.append(Segment(slots[slot], token, token + length))
        token += length
    x, y = torch.randn(token, 12, dtype=dtype), torch.randn(token, 20, dtype=dtype)
    expected, got = y.clone(), y.clone()
    reference_lora(expected, x, pool.sites["q"], segments)
    with _kernel(backend) as kernel:
        kernel(got, x, pool.sites["q"], segments)
        if backend != "segmented":
            _check_each_token_alone(kernel, got, x, y, pool, segments)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance * 8)
    untouched = torch.ones(token, dtype=torch.bool)
    for _, start, stop in segments:
        untouched[start:stop] = False
    assert torch.equal(got[untouched], y[untouched])
