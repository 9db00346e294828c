"""The native attention over pages, compared with a plain softmax in float32."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.native_kernels import ISAS, TILE, Cache, Kind, Piece, attend, threads, using


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths. Each is computed in chunks that end at its cuts."""

    kind: Kind
    lengths: list[int]
    cuts: list[list[int]]
    seed: int

    def chunks(self, sequence: int) -> list[tuple[int, int]]:
        length = self.lengths[sequence]
        ends = sorted({min(cut, length) for cut in self.cuts[sequence]} | {length})
        return list(zip([0, *ends[:-1]], ends, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    kind = Kind(
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        head_dim=16 * draw(st.integers(1, 16)),
        scale=draw(st.sampled_from([0.05, 0.3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        window=draw(st.sampled_from([0, 0, 1, 16, 23])),
    )
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    cuts = draw(
        st.lists(st.lists(st.integers(1, 70), max_size=3), min_size=len(lengths), max_size=len(lengths))
    )
    return Case(kind, lengths, cuts, draw(st.integers(0, 99)))


class Setup:
    """The sequences of a case. Each uses random tiles of a shared cache."""

    def __init__(self, case: Case, layout: int = 0) -> None:
        torch.manual_seed(case.seed)
        kind = case.kind
        self.case = case
        self.sequences = [
            (
                torch.randn(length, kind.heads, kind.head_dim).bfloat16(),
                torch.randn(length, kind.kv_heads, kind.head_dim).bfloat16(),
                torch.randn(length, kind.kv_heads, kind.head_dim).bfloat16(),
            )
            for length in case.lengths
        ]
        tiles = [-(-length // TILE) for length in case.lengths]
        torch.manual_seed(layout)
        order = torch.randperm(sum(tiles) + 2).tolist()
        self.cache = Cache(kind, len(order))
        self.tiles = [[order.pop() for _ in range(count)] for count in tiles]

    def piece(self, sequence: int, start: int, stop: int) -> Piece:
        return Piece(self.sequences[sequence], self.tiles[sequence], start, stop - start)


def _reference(qkv: tuple[Tensor, Tensor, Tensor], kind: Kind) -> Tensor:
    q, k, v = (x.float().transpose(0, 1) for x in qkv)
    k, v = (x.repeat_interleave(kind.heads // kind.kv_heads, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * kind.scale
    if kind.softcap:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    age = torch.arange(len(scores[0]))[:, None] - torch.arange(len(scores[0]))[None]
    seen = (age >= 0) & (age < (kind.window or len(age)))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@settings(deadline=None, max_examples=40)
@given(cases())
@pytest.mark.parametrize("isa", ISAS)
def test_attention_equals_a_plain_softmax(isa: str, case: Case) -> None:
    """One step computes the first chunks of all sequences, the next step the second chunks, and so on."""
    made = Setup(case)
    got: list[list[Tensor]] = [[] for _ in case.lengths]
    chunks = [case.chunks(sequence) for sequence in range(len(case.lengths))]
    with using(isa) as loaded:
        for turn in range(max(map(len, chunks))):
            step = [i for i in range(len(chunks)) if turn < len(chunks[i])]
            outs = attend(loaded, made.cache, [made.piece(i, *chunks[i][turn]) for i in step])
            for i, out in zip(step, outs, strict=True):
                got[i].append(out)
    for qkv, parts in zip(made.sequences, got, strict=True):
        torch.testing.assert_close(torch.cat(parts).float(), _reference(qkv, case.kind), rtol=0.02, atol=0.02)


@settings(deadline=None, max_examples=25)
@given(cases())
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_has_the_same_bits_in_every_batch(isa: str, case: Case) -> None:
    """Whole prompts on two threads equal chunks computed alone, elsewhere in memory, on one thread."""
    with using(isa) as loaded:
        together = Setup(case)
        with threads(2):
            pieces = [together.piece(i, 0, length) for i, length in enumerate(case.lengths)]
            outs = attend(loaded, together.cache, pieces)
        with threads(1):
            for i, expected in enumerate(outs):
                alone = Setup(case, layout=1)
                parts = [attend(loaded, alone.cache, [alone.piece(i, *c)])[0] for c in case.chunks(i)]
                assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_one_request_does_not_change_another(isa: str) -> None:
    case = Case(Kind(), [20, 20], [[], []], seed=0)
    whole, broken = Setup(case), Setup(case)
    broken.sequences[0][2][3] = torch.inf
    broken.sequences[0][1][5] = torch.nan
    with using(isa) as loaded:
        fine, hurt = (
            attend(loaded, made.cache, [made.piece(0, 0, 20), made.piece(1, 0, 20)])
            for made in (whole, broken)
        )
    assert torch.equal(fine[1], hurt[1])
    assert torch.equal(fine[0][:3], hurt[0][:3]), "an earlier token must not attend to the broken one"
    assert hurt[0][5:].isnan().all(), "a later token must attend to the broken one"
