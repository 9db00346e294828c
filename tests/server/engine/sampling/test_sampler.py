from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from server.engine.sampling import truncation
from server.engine.sampling.logits_processors import apply_logits_processors
from server.engine.sampling.rng import answer_seed, uniform
from server.engine.sampling.sampler import Sample, sample
from server.engine.sampling_params import SamplingDefaults, SamplingParams
from server.engine.sequence import Sequence
from server.errors import InvalidRequest
from server.http.schema import CompletionBody


def _sequence(
    prompt: tuple[int, ...] = (1, 2), generated: tuple[int, ...] = (), seed: int = 3, **params: object
) -> Sequence:
    sampling = SamplingParams(**({"max_tokens": 99} | params))  # type: ignore[arg-type]
    sequence = Sequence("r", 0, prompt, None, sampling, seed, 0, frozenset({0}))
    sequence.tokens += generated
    return sequence


def _samples(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Sample]:
    return sample(logits, sequences).read()


def _one(logits: list[float], **params: object) -> Sample:
    return _samples(torch.tensor([logits]), [_sequence(**params)])[0]  # type: ignore[arg-type]


def _frequencies(logits: Tensor, count: int = 4000, **params: object) -> Tensor:
    sequences = [_sequence(seed=seed, **params) for seed in range(count)]  # type: ignore[arg-type]
    tokens = [sample.token for sample in _samples(logits.expand(count, -1), sequences)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_temperature_zero_takes_the_best() -> None:
    assert _one([0.0, 3.0, 1.0], temperature=0.0).token == 1


def test_samples_follow_the_distribution() -> None:
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
        ({"top_k": 3, "top_p": 0.75}, [2, 1]),  # top_p applies to what top_k kept
        ({"top_p": 1e-9}, [2]),
        ({"top_p": 1e-300}, [2]),  # 0 in float32
        ({"top_p": 0.0}, [2]),
        ({"top_k": 1}, [2]),
        ({"min_p": 1.0}, [2]),
        ({"temperature": 1e-38}, [2]),  # a logit divided by this becomes infinite
        ({"temperature": 1e-300}, [2]),
        ({"temperature": 1e-5}, [2]),
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
@example(seed=1, top_k=600, top_p=0.3, min_p=0.0)  # top_p applies to what top_k kept, also beyond the head
def test_sorting_only_the_head_gives_the_same_result(
    seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    """Flat rows need a full sort and peaked rows do not. The result equals that of a full sort."""
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * (0.1 + seed % 4)
    token = _samples(logits[None], [_sequence(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p)])[0].token
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
    together = _samples(logits, sequences)
    alone = [_samples(logits[i : i + 1], [sequence])[0] for i, sequence in enumerate(sequences)]
    assert together == alone


def test_penalties_count_generated_tokens_or_all() -> None:
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
    sample = _one([0.0, 1.0, 2.0], logprobs=2, temperature=0.0, logit_bias={0: 50.0})
    expected = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1)
    assert sample.token == 0
    assert sample.logprobs is not None
    assert sample.logprobs.sampled == pytest.approx(expected[0].item())
    assert sample.logprobs.top_ids == (2, 1)
    assert sample.logprobs.top == pytest.approx([expected[2].item(), expected[1].item()])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nan_or_infinity_gives_no_token_and_others_are_sampled(
    broken: float, temperature: float
) -> None:
    logits = torch.tensor([[0.0, broken, 1.0], [0.0, 1.0, 9.0]])
    samples = _samples(logits, [_sequence(temperature=temperature), _sequence(temperature=0.0)])
    assert samples[0].token is None
    assert samples[1].token == 2


def test_random_numbers_depend_only_on_seed_and_position() -> None:
    assert uniform(5, 7) == uniform(5, 7)
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == 1600
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 1600 - 0.5) < 0.03
    assert answer_seed(5, 0) != answer_seed(5, 1)


EDGES = [0.0, 5e-324, 1e-300, 2.0**-25, 1 - 2.0**-24, 1 - 2.0**-25, 1 - 1e-8, math.nextafter(1.0, 0.0)]
"""Random numbers in [0, 1). From the sixth on they are 1 in float32."""

TRUNCATIONS: list[dict[str, object]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 700},
    {"top_p": 1e-300},
    {"top_p": 0.5},
    {"top_p": 0.999999},
    {"min_p": 1e-9},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("params", TRUNCATIONS)
@pytest.mark.parametrize("peak", [0.0, 0.01, 4.0, 60.0])
def test_extreme_random_numbers_sample_tokens_with_a_probability(
    monkeypatch: pytest.MonkeyPatch, edge: float, params: dict[str, object], peak: float
) -> None:
    """Of 2,000 tokens the first and the last 300 have no probability. Truncations keep 1 to all others."""
    logits = torch.linspace(0.0, peak, 2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    logits[:300] = logits[-300:] = -1e9
    monkeypatch.setattr(truncation, "uniform", lambda *_: edge)
    token = _samples(logits[None], [_sequence(**params)])[0].token  # type: ignore[arg-type]
    assert token in allowed(logits, **params)  # type: ignore[arg-type]


def allowed(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> set[int]:
    """Every token that the truncation may keep, with some tolerance for float32 and for equal logits."""
    if temperature < 1e-5 or top_p == 0.0 or top_k == 1:
        return set((logits == logits.max()).nonzero()[:, 0].tolist())
    probs = ((logits.double() - logits.max()) / temperature).softmax(-1)
    ordered = probs.sort(descending=True).values
    floor = ordered[min(top_k, len(ordered)) - 1] if top_k else ordered[-1]
    floor = torch.maximum(floor, min_p * ordered[0])
    kept = ordered[ordered >= floor * (1 - 1e-5)]
    above = kept.cumsum(0) - kept  # the sum of the more probable tokens
    last = kept[above <= (top_p + 1e-6) * kept.sum()][-1]
    return set(((probs >= last * (1 - 1e-5)) & (probs > 0)).nonzero()[:, 0].tolist())


def test_a_random_number_that_is_one_in_float32_samples_an_allowed_token() -> None:
    """One random number in thirty million is 1 in float32. This is number 20 of this seed."""
    number = uniform(answer_seed(14120141, 0), 20)
    assert number < 1.0 == torch.tensor(number, dtype=torch.float32).item()
    logits = torch.linspace(3.0, -200.0, 1000)
    for params in ({"top_k": 1}, {"top_k": 2, "top_p": 1e-9}, {"top_p": 0.01}, {"min_p": 0.99}):
        sequence = _sequence(tuple(range(20)), seed=answer_seed(14120141, 0), **params)
        assert _samples(logits[None], [sequence])[0].token == 0
    sequence = _sequence(tuple(range(20)), seed=answer_seed(14120141, 0))
    last = _samples(logits[None], [sequence])[0].token
    assert last is not None
    assert logits.softmax(-1)[last] > 0


@pytest.mark.parametrize("params", [{}, {"top_k": 600}, {"top_p": 0.9}])
def test_a_rounded_sum_samples_no_token_without_probability(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, object]
) -> None:
    """A GPU sums in parallel, so rounding may do this. The test makes the error larger."""
    cumsum = Tensor.cumsum

    def rounded(self: Tensor, *arguments: Any, **others: Any) -> Tensor:
        return cumsum(self, *arguments, **others) + torch.arange(self.shape[-1]) * 1e-3

    monkeypatch.setattr(Tensor, "cumsum", rounded)
    logits = torch.full((2000,), -1e9)
    logits[1000:1004] = torch.tensor([0.0, 2.0, 1.0, 0.0])
    sequences = [_sequence(seed=seed, **params) for seed in range(100)]  # type: ignore[arg-type]
    tokens = {sample.token for sample in _samples(logits.expand(100, -1), sequences)}
    assert tokens <= {1000, 1001, 1002, 1003}


EXTREMES = st.fixed_dictionaries(
    {"model": st.just("m"), "prompt": st.just("p")},
    optional={
        "temperature": st.floats(-0.1, 2.1) | st.sampled_from([0.0, 5e-324, 1e-38, 1e-5, 9e-6, 2.0, 1e30]),
        "top_p": st.floats(-0.1, 1.1) | st.sampled_from([0.0, 5e-324, 1e-300, 1e-45, 1 - 1e-16, 1.0]),
        "top_k": st.integers(-2, 2**31) | st.sampled_from([-1, 0, 1, 2**31 - 1]),
        "min_p": st.floats(-0.1, 1.1) | st.sampled_from([0.0, 5e-324, 1e-38, 1.0]),
        "repetition_penalty": st.floats(0, 101) | st.sampled_from([1e-38, 0.01, 100.0, 1e300]),
        "presence_penalty": st.floats(-2.1, 2.1) | st.sampled_from([-2.0, 5e-324, 2.0]),
        "frequency_penalty": st.floats(-2.1, 2.1) | st.sampled_from([-2.0, 5e-324, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, 699).map(str), st.floats(-101, 101), max_size=5),
        "min_tokens": st.sampled_from([0, 16, 17]),
        "stop_token_ids": st.lists(st.integers(0, 699), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
)


@settings(deadline=None, max_examples=200)
@given(EXTREMES, st.integers(0, 20), st.sampled_from([0.01, 3.0, 1e4, 1e30]))
def test_all_sampling_parameters_are_refused_or_give_an_allowed_token(
    fields: dict[str, Any], seed: int, scale: float
) -> None:
    try:
        params = CompletionBody.model_validate(fields).sampling(16, None, SamplingDefaults())
    except (ValidationError, InvalidRequest):
        return
    sequence = _sequence((1, 2, 3), (1, 1, 5), **{**asdict(params), "seed": seed})
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(seed)) * scale
    token = _samples(logits, [sequence])[0].token
    kept = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    assert token in allowed(apply_logits_processors(logits, [sequence], None)[0], **kept)


def test_a_row_has_the_same_sample_beside_other_rows() -> None:
    """Also with ties: a neighbour's number of log-probabilities must not change their order."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(9, 5003, generator=generator) * 8).round() / 8
    wishes: list[dict[str, Any]] = [
        {"logprobs": k, "temperature": t} for k in (1, 5, 20) for t in (0.0, 0.7, 1.0)
    ]
    sequences = [_sequence(seed=i, top_p=1.0 - 0.1 * (i % 2), **w) for i, w in enumerate(wishes)]
    together = _samples(logits, sequences)
    assert together == [_samples(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    assert any(
        len(set(sample.logprobs.top)) < len(sample.logprobs.top) for sample in together if sample.logprobs
    )
