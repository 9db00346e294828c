"""The results of the Triton attention, on a GPU or else with Triton's interpreter.

pytest does not collect this file: ``test_interpreted.py`` runs it in a process that uses the interpreter.
"""

from __future__ import annotations

import pytest
import torch

from server.engine.attention import AttentionSpec, triton_paged
from server.engine.attention.flash_paged import FlashPaged
from server.engine.attention.reference import ReferencePaged
from server.engine.attention.triton_paged import TritonPaged
from tests.server.engine.attention.stepped_sequences import LONGEST, PREEMPT, World, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = [[1] * 70, [1] * 40, [2] * 3]
STEPS = [[70, 0, 3], [0, 40, 1], [1, 1, 1], [1, PREEMPT, 1], [1, 33, 0], [1, 9, 1], [1, 1, 1]]
EXACT = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(world: World, spec: AttentionSpec, graph_batch_size: int | None = None) -> None:
    """Compare steps with the reference. Prompts are cut, continued and mixed with decoding."""
    backends = [
        FlashPaged(kernel, world.block_size, world.device, world.dtype, LONGEST)
        for kernel in (TritonPaged(), ReferencePaged())
    ]
    for backend in backends:
        backend.allocate(world.shapes, world.num_blocks)
        for pages in backend.pages[0]:
            pages.fill_(torch.nan)  # pages that were not written must not be read
    exact = EXACT[world.dtype]
    for step in STEPS:
        chunks = world.step(step)
        graph_batch = graph_batch_size if all(chunk.length == 1 for chunk in chunks) else None
        qkv = world.inputs(chunks, graph_batch)
        ours, theirs = (run(backend, spec, chunks, qkv, graph_batch) for backend in backends)
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)
        world.done(chunks)


@pytest.fixture(params=[1, 48], ids=["whole", "split"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of programs for which no sequence is split, or each is."""
    monkeypatch.setattr(triton_paged, "_PROGRAMS", request.param)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(0.3, 21, 2.0)], ids=["plain", "window"])
def test_steps_equal_the_reference(spec: AttentionSpec, dtype: torch.dtype) -> None:
    check(World(PROMPTS, group=3, dtype=dtype, device=DEVICE), spec)


@pytest.mark.parametrize(("group", "dim", "page"), [(1, 72, 16), (20, 16, 64), (4, 256, 5)])
def test_any_heads_and_pages(group: int, dim: int, page: int) -> None:
    world = World(PROMPTS, 1, group, dim, page, dtype=torch.float16, device=DEVICE)
    check(world, AttentionSpec(dim**-0.5, softcap=1.0))


@pytest.mark.usefixtures("programs")
def test_graph_batches() -> None:
    check(World(PROMPTS, dtype=torch.bfloat16, device=DEVICE), AttentionSpec(0.3, 5), 6)
