"""Attention over pages by flash kernels, compared with gathered pages. Fakes replace the kernels on a CPU."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.attention import AttentionSpec
from server.engine.attention.flash_kernels import FlashAttn, TorchVarlen
from server.engine.attention.flash_metadata import FlashMetadata
from server.engine.attention.flash_paged import FlashPaged, PagedKernel
from server.engine.attention.reference import ReferencePaged
from server.engine.attention.torch_paged import TorchPaged
from server.engine.sequence import Chunk
from tests.server.engine.attention import fake_flash as contracts
from tests.server.engine.attention.stepped_sequences import LONGEST, PREEMPT, Qkv, World, run

CPU = torch.device("cpu")
FLASH_ATTN = FlashAttn(contracts.flash_attn_varlen_func, contracts.flash_attn_with_kvcache, "of the tests")
KERNELS: list[PagedKernel] = [ReferencePaged(), FLASH_ATTN, TorchVarlen(contracts.varlen_attn)]

STEPS = st.lists(
    st.lists(st.sampled_from([PREEMPT, 0, 1, 1, 1, 3, 17, 40]), min_size=3, max_size=3), max_size=7
)
PROMPTS = st.lists(st.sampled_from([1, 15, 16, 33, 50]), min_size=3, max_size=3)


def flash(world: World, kernel: PagedKernel) -> FlashPaged:
    backend = FlashPaged(kernel, world.block_size, world.device, world.dtype, LONGEST)
    backend.allocate(world.shapes, world.num_blocks)
    return backend


def gathered(world: World) -> TorchPaged:
    backend = TorchPaged(world.block_size, world.device, world.dtype)
    backend.allocate(world.shapes, world.num_blocks)
    return backend


def without_padding(qkv: Qkv, chunks: list[Chunk]) -> Qkv:
    tokens = sum(chunk.length for chunk in chunks)
    q, k, v = (x[:tokens] for x in qkv)
    return q, k, v


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@given(
    lengths=PROMPTS,
    steps=STEPS,
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 16, 21]),
    softcap=st.sampled_from([None, 2.0]),
    graph_batch=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_steps_equal_gathered_pages(
    kernel: PagedKernel,
    lengths: list[int],
    steps: list[list[int]],
    kv_heads: int,
    group: int,
    window: int | None,
    softcap: float | None,
    graph_batch: bool,
) -> None:
    world = World([[0, *[1] * (length - 1)] for length in lengths], kv_heads, group)
    spec = AttentionSpec(0.3, window, None if isinstance(kernel, TorchVarlen) else softcap)
    ours, theirs = flash(world, kernel), gathered(world)
    for step in [*steps, [LONGEST] * 3, [1] * 3]:
        chunks = world.step(step)
        if not chunks:
            continue
        graph_batch_size = 5 if graph_batch and all(chunk.length == 1 for chunk in chunks) else None
        qkv = world.inputs(chunks, graph_batch_size)
        expected = run(theirs, spec, chunks, without_padding(qkv, chunks))
        torch.testing.assert_close(
            run(ours, spec, chunks, qkv, graph_batch_size), expected, rtol=1e-5, atol=1e-5
        )
        world.done(chunks)


def test_prefixes_are_read_from_shared_blocks() -> None:
    world = World([[0] * 40, [0] * 50])
    spec, backend = AttentionSpec(0.3), flash(world, ReferencePaged())
    chunks = world.step([40])
    run(backend, spec, chunks, world.inputs(chunks))
    world.done(chunks)
    chunks = world.step([0, 50])
    assert chunks[0].start == 32
    q, k, v = world.inputs(chunks)
    alone = flash(other := World([[0] * 50]), ReferencePaged())
    whole = other.step([50])
    expected = run(
        alone, spec, whole, (torch.cat([torch.zeros(32, *q.shape[1:]), q]), *other.inputs(whole)[1:])
    )
    torch.testing.assert_close(run(backend, spec, chunks, (q, k, v)), expected[32:])


class Recorder:
    """A kernel that records the addresses and numbers it gets for each batch size."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = defaultdict(list)

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, metadata: FlashMetadata, spec: AttentionSpec
    ) -> Tensor:
        fixed = (
            keys,
            values,
            metadata.new_slots,
            metadata.query_starts,
            metadata.kv_starts,
            metadata.lengths,
            metadata.tables,
        )
        places = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in fixed]
        self.seen[len(q)].append((places, metadata.max_query, metadata.max_length))
        return ReferencePaged()(q, keys, values, metadata, spec)


def test_tensors_that_a_graph_captured_keep_their_addresses() -> None:
    world = World([[i % 4] * (3 + 7 * i) for i in range(6)])
    recorder = Recorder()
    backend, theirs, spec = flash(world, recorder), gathered(world), AttentionSpec(0.3)
    chunks = world.step([LONGEST] * 6)
    qkv = world.inputs(chunks)
    assert run(backend, spec, chunks, qkv).isfinite().all()
    run(theirs, spec, chunks, qkv)
    world.done(chunks)
    backend.begin([], 8)
    backend.attend(0, torch.zeros(8, 4, 8), spec)
    for live in (1, 6, 3, 4, 6, 2, 5, 6):
        world.preempt(world.sequences[0])
        chunks = world.step([1] * live)
        chunks = [chunk for chunk in chunks if chunk.length == 1]
        for graph_batch_size in (8, 16):
            qkv = world.inputs(chunks, graph_batch_size)
            expected = run(theirs, spec, chunks, without_padding(qkv, chunks))
            torch.testing.assert_close(
                run(backend, spec, chunks, qkv, graph_batch_size), expected, rtol=1e-5, atol=1e-5
            )
        world.done(chunks)
    for graph_batch_size in (8, 16):
        assert len(recorder.seen[graph_batch_size]) >= 8
        assert all(seen == recorder.seen[graph_batch_size][0] for seen in recorder.seen[graph_batch_size])


def test_padding_writes_only_to_the_spare_block() -> None:
    world = World([[0] * 20])
    backend, spec = flash(world, ReferencePaged()), AttentionSpec(0.3)
    chunks = world.step([19])
    run(backend, spec, chunks, world.inputs(chunks))
    world.done(chunks)
    before = [pages[:-1].clone() for pages in backend.pages[0]]
    chunks = world.step([1])
    run(backend, spec, chunks, world.inputs(chunks, 4), 4)
    assert backend.new_slots[1:].tolist() == [world.num_blocks * world.block_size] * 3
    for pages, old in zip(backend.pages[0], before, strict=True):
        changed = (pages[:-1] != old).any(-1).any(-1)
        assert changed.sum() == 1
        assert not pages[:-1].isnan().any()


class Noted:
    """A function that records its arguments."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


def both_kinds_of_step(kernel: PagedKernel) -> None:
    world = World([[0] * 20, [1] * 9])
    backend = flash(world, kernel)
    for spec in (AttentionSpec(0.3), AttentionSpec(0.3, 4)):
        for step in ([20, 5], [1, 1]):
            chunks = world.step(step)
            run(backend, spec, chunks, world.inputs(chunks))
            world.done(chunks)


def test_the_calls_fit_pytorchs_signature() -> None:
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    try:
        TorchVarlen.load()
    except ImportError:
        pytest.skip("varlen_attn of this PyTorch has no parameter for a block table")
    assert logging.getLogger("torch.nn.attention.varlen").level == logging.WARNING, (
        "at INFO it logs each call"
    )
    noted = Noted(contracts.varlen_attn)
    both_kinds_of_step(TorchVarlen(noted))
    assert [kwargs["window_size"] for _, kwargs in noted.calls] == [(-1, 0), (-1, -1), (3, 0), (3, 0)]
    for args, kwargs in noted.calls:
        signature(varlen_attn).bind(*args, **kwargs)
        out = varlen_attn(*map(on_meta, args), **{name: on_meta(value) for name, value in kwargs.items()})
        assert out.shape == args[0].shape


def test_the_calls_fit_flash_attns_signature() -> None:
    flash_attn = pytest.importorskip("flash_attn")
    varlen, with_kvcache = Noted(contracts.flash_attn_varlen_func), Noted(contracts.flash_attn_with_kvcache)
    both_kinds_of_step(FlashAttn(varlen, with_kvcache, ""))
    for noted in (varlen, with_kvcache):
        assert noted.calls
        for args, kwargs in noted.calls:
            signature(getattr(flash_attn, noted.function.__name__)).bind(*args, **kwargs)


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
