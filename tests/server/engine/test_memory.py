"""How a GPU's memory is divided. The GPU is a fake."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import LoadedBase, load_base, prepare_base
from adapters.pool.rank_pool import RankPool, row_bytes
from server.config import ConfigError, from_args
from server.engine.gpu_memory import GpuMeter, largest_step, step_bytes
from server.engine.memory import GRAPHS, LATER, RANK, Share, left_for_kv, rows_that_fit, usable
from server.engine.model.transformers_model import TransformersModel
from server.engine.sizes import Sizes, out_of_memory_names
from tests.support.tiny_models import make_tiny_model

GB = 1 << 30
BLOCK = 16


class MadeUp:
    """A GPU. A step takes ``step`` bytes, other processes hold ``others``, and we hold ``held``."""

    def __init__(self, total: int, held: int, others: int = 0, step: int = 0) -> None:
        self.total, self.held, self.others, self.step = total, held, others, step
        self.readings = 0

    def free(self) -> int:
        self.readings += 1
        left = self.total - self.held - self.others
        return left - (self.step if self.readings == 3 else 0)  # read at first, before the step, and after it

    def ours(self) -> int:
        return self.held

    def release(self) -> None:
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    home = tmp_path_factory.mktemp("memory")
    folder = make_tiny_model("llama", home / "model")
    return load_base(prepare_base(str(folder), home, "none", progress=False), "cpu")


@pytest.fixture(scope="module")
def model(base: LoadedBase) -> TransformersModel:
    return TransformersModel(base, RankPool(base.layout.sites, 4, base.model.dtype))


def _sizes(base: LoadedBase, meter: MadeUp, *flags: str) -> Sizes:
    flags = ("--max-num-batched-tokens", "48", "--max-num-seqs", "8", *flags)
    return Sizes(from_args(list(flags), {}), base, meter)


@given(
    st.integers(1, 100 * GB),
    st.floats(0.01, 1),
    st.lists(st.integers(0, 20 * GB), max_size=6),
    st.integers(1, GB),
)
def test_keys_and_values_get_exactly_the_memory_that_is_left(
    total: int, utilization: float, taken: list[int], least: int
) -> None:
    shares = [Share(f"number {i}", nbytes) for i, nbytes in enumerate(taken)]
    left = usable(total, utilization) - sum(taken)
    if left < least:
        with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
            left_for_kv(total, utilization, shares, least)
    else:
        assert left_for_kv(total, utilization, shares, least) == left
        assert left + sum(taken) <= total


def test_the_error_lists_the_largest_uses_first_with_their_flags() -> None:
    shares = [
        Share("the base", 5 * GB, "--base"),
        Share("rank rows", 16 * GB, "--max-loras"),
        Share("others", 0),
    ]
    with pytest.raises(ConfigError) as raised:
        left_for_kv(24 * GB, 0.9, shares, GB)
    assert str(raised.value) == (
        "--gpu-memory-utilization 0.9: 21.60 GiB of the GPU's 24.00 GiB may be used. These are taken: "
        "16.00 GiB for rank rows (--max-loras); 5.00 GiB for the base (--base); 0.00 GiB for others. That "
        "leaves 0.60 GiB for keys and values, which need at least 1.00 GiB; raise --gpu-memory-utilization, "
        "or give less to one of these"
    )


@given(st.integers(1, 512), st.integers(1, 256), st.integers(1, 1 << 24), st.integers(0, 80 * GB))
def test_rank_rows_are_for_every_answer_or_a_quarter_of_the_room(
    answers: int, max_rank: int, bytes_a_row: int, room: int
) -> None:
    rows = rows_that_fit(answers, max_rank, bytes_a_row, room)
    assert max_rank <= rows <= max(answers * RANK, max_rank)
    assert rows == max_rank or rows * bytes_a_row * 4 <= room
    if answers * RANK * bytes_a_row * 4 <= room:
        assert rows == max(answers * RANK, max_rank)


def test_the_memory_that_is_left_becomes_blocks(base: LoadedBase, model: TransformersModel) -> None:
    token = sum(shape.bytes_per_token(base.model.dtype) for shape in model.shapes.values())
    pool = RankPool(base.layout.sites, 64, base.model.dtype)
    meter = MadeUp(total=10 * GB, held=2 * GB, others=GB, step=GB // 2)
    blocks = _sizes(base, meter, "--lora-extra-memory", "1GiB").kv_blocks(model, pool)
    buffers = 8 * base.model.config.vocab_size * 24
    left = 9 * GB - (2 * GB + GB + GB // 2 + GB + GRAPHS + LATER) - buffers
    assert blocks == left // (BLOCK * token)
    assert meter.readings == 3


def test_rotary_tables_are_counted(
    base: LoadedBase, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary tables are created after the memory is divided."""
    pool = RankPool(base.layout.sites, 64, base.model.dtype)
    token = sum(shape.bytes_per_token(base.model.dtype) for shape in model.shapes.values())
    none = _sizes(base, MadeUp(10 * GB, 2 * GB)).kv_blocks(model, pool)
    monkeypatch.setattr(model, "bytes_a_position", 1 << 20, raising=False)
    some = _sizes(base, MadeUp(10 * GB, 2 * GB)).kv_blocks(model, pool)
    assert none - some == pytest.approx(
        base.model.config.max_position_embeddings * (1 << 20) / (BLOCK * token), abs=1
    )


def test_without_graphs_no_memory_is_kept_for_them(base: LoadedBase, model: TransformersModel) -> None:
    pool = RankPool(base.layout.sites, 64, base.model.dtype)
    token = sum(shape.bytes_per_token(base.model.dtype) for shape in model.shapes.values())
    with_graphs, without = (
        _sizes(base, MadeUp(10 * GB, 2 * GB), *flags).kv_blocks(model, pool)
        for flags in ((), ("--enforce-eager",))
    )
    assert without - with_graphs == pytest.approx(GRAPHS / (BLOCK * token), abs=1)


def test_too_little_memory_is_refused_and_an_explicit_size_is_used(
    base: LoadedBase, model: TransformersModel
) -> None:
    pool = RankPool(base.layout.sites, 64, base.model.dtype)
    full = MadeUp(total=2 * GB, held=GB)
    with pytest.raises(ConfigError, match=r"0\.00 GiB for keys and values"):
        _sizes(base, full).kv_blocks(model, pool)
    token = sum(shape.bytes_per_token(base.model.dtype) for shape in model.shapes.values())
    asked = _sizes(base, full, "--kv-cache-memory", str(BLOCK * token * 7))
    assert asked.kv_blocks(model, pool) == 7
    with pytest.raises(ConfigError, match="one block of this model"):
        _sizes(base, full, "--kv-cache-memory", "1").kv_blocks(model, pool)


def test_rank_rows_are_explicit_or_fit_the_device(base: LoadedBase) -> None:
    a_row = row_bytes(base.layout.sites, base.model.dtype)
    assert _sizes(base, MadeUp(10 * GB, GB)).pool_rows() == 8 * RANK
    assert _sizes(base, MadeUp(10 * GB, GB), "--max-loras", "20").pool_rows() == 20 * RANK
    room = a_row * 4 * 70
    tight = MadeUp(10 * GB, 9 * GB - room)
    assert _sizes(base, tight).pool_rows() == 64
    assert _sizes(base, MadeUp(GB, GB), "--max-lora-rank", "5").pool_rows() == 5
    assert Sizes(from_args([], {}), base).pool_rows() == 16 * RANK, "the default on a CPU"


def test_the_largest_step_uses_all_tokens_and_sequences_and_runs(
    base: LoadedBase, model: TransformersModel
) -> None:
    chunks, blocks = largest_step(base.model.config, max_tokens=48, max_seqs=8, longest=100, block_size=BLOCK)
    assert sum(chunk.length for chunk in chunks) == 48
    assert chunks[-1].start + chunks[-1].length == 100
    model.allocate(blocks, BLOCK)
    assert model(chunks).shape == (8, base.model.config.vocab_size)


def test_the_memory_of_a_step_is_measured_and_its_pages_are_freed(
    base: LoadedBase, model: TransformersModel
) -> None:
    chunks, blocks = largest_step(base.model.config, max_tokens=48, max_seqs=8, longest=100, block_size=BLOCK)
    pages: list[weakref.ref[object]] = []

    class Watching(MadeUp):
        def free(self) -> int:
            pages.append(weakref.ref(model.attention))
            return super().free()

    meter = Watching(GB, 0, step=1000)
    meter.readings = 1
    assert step_bytes(model, chunks, blocks, BLOCK, meter) == 1000
    assert [reference() for reference in pages] == [None, None]


def test_a_short_context_makes_a_short_step(base: LoadedBase) -> None:
    chunks, blocks = largest_step(base.model.config, max_tokens=48, max_seqs=2, longest=20, block_size=BLOCK)
    assert [chunk.length for chunk in chunks] == [1, 20]
    assert blocks == 2


def test_memory_that_runs_out_at_the_start_names_the_flag() -> None:
    with (
        pytest.raises(ConfigError, match=r"^--kv-cache-memory: .* 5 blocks"),
        out_of_memory_names("--kv-cache-memory", "5 blocks"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory\nand a trace")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_memory_of_a_step_on_a_gpu(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    base = load_base(prepare_base(str(folder), tmp_path, "none", progress=False), "cuda")
    pool = RankPool(base.layout.sites, 64, base.model.dtype, base.model.device)
    model = TransformersModel(base, pool)
    chunks, blocks = largest_step(base.model.config, 48, 8, 100, BLOCK)
    meter = GpuMeter(base.model.device)
    assert 0 < step_bytes(model, chunks, blocks, BLOCK, meter) < GB
    assert 0 < meter.ours() < meter.total - meter.free()
