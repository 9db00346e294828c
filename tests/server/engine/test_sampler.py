from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.random_draws import answer_seed, uniform
from server.engine.request import SamplingParams
from server.engine.sampler import Draw, draw
from server.engine.sequence import Sequence


def _sequence(
    prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), seed: int = 3, **params: object
) -> Sequence:
    sampling = SamplingParams(**({"max_tokens": 99} | params))  # type: ignore[arg-type]
    sequence = Sequence("r", 0, prompt, None, sampling, seed, 0, frozenset({0}))
    sequence.tokens += generated
    return sequence


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Draw]:
    return draw(logits, sequences).read()


def _one(logits: list[float], **params: object) -> Draw:
    return sample(torch.tensor([logits]), [_sequence(**params)])[0]  # type: ignore[arg-type]


def _frequencies(logits: Tensor, draws: int = 4000, **params: object) -> Tensor:
    sequences = [_sequence(seed=seed, **params) for seed in range(draws)]  # type: ignore[arg-type]
    tokens = [draw.token for draw in sample(logits.expand(draws, -1), sequences)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


def test_temperature_zero_takes_the_best() -> None:
    assert _one([0.0, 3.0, 1.0], temperature=0.0).token == 1


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    assert torch.allclose(_frequencies(logits), logits.softmax(-1), atol=0.03)
    assert torch.allclose(_frequencies(logits, temperature=2.0), (logits / 2).softmax(-1), atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [2, 1]),
        ({"top_p": 0.5}, [2]),
        ({"top_p": 0.8}, [2, 1]),
        ({"min_p": 0.3}, [2, 1]),
        ({"top_k": 3, "top_p": 0.75}, [2, 1]),  # top_p counts within what top_k left
        ({"top_p": 1e-9}, [2]),
    ],
)
def test_truncation_keeps_and_renormalises(params: dict[str, Any], kept: list[int]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])  # probabilities 0.09, 0.24, 0.64, 0.03
    expected = torch.zeros(4)
    expected[kept] = logits.softmax(-1)[kept]
    assert torch.allclose(_frequencies(logits, **params), expected / expected.sum(), atol=0.03)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 5, 600, 1500]),
    st.sampled_from([0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.05]),
)
@example(seed=1, top_k=600, top_p=0.3, min_p=0.0)  # top_p counts within what top_k left, beyond the head too
def test_looking_at_the_head_alone_changes_nothing(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    """Wide flat rows need the whole sort, peaked ones do not; the draw is as if everything were sorted."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * (0.1 + seed % 4)
    token = sample(logits[None], [_sequence(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p)])[0].token
    assert token is not None
    probs = logits.softmax(-1)
    ordered, order = probs.sort(descending=True)
    rank = int((order == token).nonzero())
    assert top_k == 0 or rank < top_k
    assert ordered[rank] >= min_p * ordered[0] * 0.999
    survivors = ordered[: top_k or None]
    survivors = survivors[survivors >= min_p * ordered[0]]
    assert survivors[:rank].sum() / survivors.sum() <= top_p + 1e-4


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, object]] = [
        {}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_k": 5}, {"presence_penalty": 1.0}, {"logprobs": 3},
    ]  # fmt: skip
    sequences = [_sequence(generated=(5, 6), seed=i, **kind) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    together = sample(logits, sequences)
    alone = [sample(logits[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]
    assert together == alone


def test_penalties_count_what_was_said() -> None:
    assert _one([1.0, 0.9], generated=(0,), presence_penalty=0.2, temperature=0.0).token == 1
    assert _one([1.0, 0.9], prompt=(0,), presence_penalty=0.2, temperature=0.0).token == 0
    assert _one([2.0, 0.9], generated=(0, 0, 0), frequency_penalty=0.4, temperature=0.0).token == 1
    assert _one([1.0, 0.9], prompt=(0,), repetition_penalty=1.5, temperature=0.0).token == 1
    assert _one([-1.0, -1.1], prompt=(0,), repetition_penalty=1.5, temperature=0.0).token == 1


def test_bias_and_min_tokens() -> None:
    assert _one([1.0, 0.0], logit_bias={1: 5.0}, temperature=0.0).token == 1
    assert _one([9.0, 1.0, 0.0], min_tokens=1, temperature=0.0).token == 1  # 0 is end-of-sequence
    assert _one([9.0, 1.0, 0.0], min_tokens=1, stop_token_ids=(1,), temperature=0.0).token == 2
    assert _one([9.0, 1.0], min_tokens=1, ignore_eos=True, temperature=0.0).token == 0


def test_logprobs_are_the_models_own() -> None:
    draw = _one([0.0, 1.0, 2.0], logprobs=2, temperature=0.0, logit_bias={0: 50.0})
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
    assert draw.token == 0
    assert draw.logprobs is not None
    assert draw.logprobs.drawn == pytest.approx(expected[0].item())
    assert draw.logprobs.top_ids == (2, 1)
    assert draw.logprobs.top == pytest.approx([expected[2].item(), expected[1].item()])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_is_told_apart_and_hurts_nobody(broken: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, broken, 1.0], [0.0, 1.0, 9.0]])
    draws = sample(logits, [_sequence(temperature=temperature), _sequence(temperature=0.0)])
    assert draws[0].token is None
    assert draws[1].token == 2


def test_random_numbers_come_from_seed_and_position_alone() -> None:
    assert uniform(5, 7) == uniform(5, 7)
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == 1600
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 1600 - 0.5) < 0.03
    assert answer_seed(5, 0) != answer_seed(5, 1)


def test_a_row_is_sampled_the_same_to_the_bit_beside_any_others() -> None:
    """Ties too: how many log-probabilities a neighbour asks for must not order them anew."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 5003, generator=generator) * 8).round() / 8
    wishes: list[dict[str, Any]] = [
        {"logprobs": k, "temperature": t} for k in (1, 5, 20) for t in (0.0, 0.7, 1.0)
    ]
    sequences = [_sequence(seed=i, top_p=1.0 - 0.1 * (i % 2), **w) for i, w in enumerate(wishes)]
    together = sample(logits, sequences)
    assert together == [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    assert any(len(set(draw.logprobs.top)) < len(draw.logprobs.top) for draw in together if draw.logprobs)
