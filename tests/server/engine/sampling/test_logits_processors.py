"""Biases, minimum lengths and penalties. Many rows in one call give the same bits as one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine.interface import GenerationRequest
from server.engine.sampling import logits_processors as shaping
from server.engine.sampling.logits_processors import apply_logits_processors
from server.engine.sampling.token_counts import TokenCounts
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Sequence, Shared
from server.engine.transfer import resolve
from tests.server.engine.fake_device import late_engine

VOCABULARY = 9
EOS = 0


def _sequence(
    prompt: list[int],
    said: tuple[int, ...] = (),
    shared: Shared | None = None,
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(**({"max_tokens": 10_000} | params))
    sequence = Sequence("r", 0, tuple(prompt), None, sampling, 0, 0, frozenset({EOS}), shared)
    sequence.tokens += said
    return sequence


def by_definition(logits: Tensor, sequence: Sequence, tokens: list[int]) -> Tensor:
    """The result for one row, computed token by token in float32. ``tokens``: those of the sequence."""
    p, answer = sequence.params, tokens[sequence.num_prompt :]
    row = [np.float32(value) for value in logits.tolist()]
    for token in range(len(row)):
        row[token] += np.float32(p.logit_bias.get(token, 0.0))
        if len(answer) < p.min_tokens and token in sequence.ends:
            row[token] = np.float32("-inf")
        repetition = np.float32(p.repetition_penalty)
        if token in tokens:
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        count = np.float32(answer.count(token))
        if count > 0:
            row[token] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * count
    return torch.tensor(np.array(row))


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.25, 100.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.5]),
        "presence_penalty": st.sampled_from([-1.0, 0.25]),
        "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 0.5])),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.just((3, 4)),
        "ignore_eos": st.booleans(),
    },
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)
ROWS = st.lists(st.tuples(TOKENS, TOKENS, PARAMS, st.booleans()), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(0, 1000))
def test_rows_in_one_call_equal_each_row_computed_step_by_step(
    rows: list[tuple[list[int], list[int], dict[str, Any], bool]], seed: int
) -> None:
    """Also while only the device has the last token."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [_sequence(prompt, **params) for prompt, _, params, _ in rows]
    for step in range(max(len(answer) for _, answer, _, _ in rows) + 1):
        prev_tokens = []
        for sequence, (prompt, answer, _, late) in zip(sequences, rows, strict=True):
            sequence.tokens = prompt + answer[:step]
            if late and 0 < step <= len(answer):
                prev_tokens.append(sequence.tokens[-1])
                sequence.tokens[-1] = -len(prev_tokens)
        logits = torch.randn(len(rows), VOCABULARY, generator=generator)
        device_tokens = torch.tensor(prev_tokens, dtype=torch.long)
        shaped = apply_logits_processors(logits, sequences, device_tokens)
        for i, sequence in enumerate(sequences):
            tokens = resolve(torch.tensor(sequence.tokens), device_tokens).tolist()
            assert torch.equal(shaped[i], by_definition(logits[i], sequence, tokens))


def test_biases_come_before_penalties_as_in_vllm() -> None:
    """The result is (1 + 1) / 2, not 1 / 2 + 1."""
    sequence = _sequence([5], logit_bias={5: 1.0}, repetition_penalty=2.0)
    assert apply_logits_processors(torch.ones(1, VOCABULARY), [sequence], None)[0, 5] == 1.0


def test_rows_without_processors_cost_nothing() -> None:
    plain = _sequence([1] * 5, (2,) * 5)
    logits = torch.ones(2, VOCABULARY)
    assert apply_logits_processors(logits, [plain, plain], None) is logits
    apply_logits_processors(logits, [plain, _sequence([1], (2,), presence_penalty=1.0)], None)
    assert plain.counts is None


def test_a_step_counts_one_token_even_in_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    find = TokenCounts._index_of

    def noted(self: TokenCounts, token: int) -> int:
        looked.append(token)
        return find(self, token)

    monkeypatch.setattr(TokenCounts, "_index_of", noted)
    sequence = _sequence(list(range(8)) * 500, (8,) * 100, repetition_penalty=1.5, frequency_penalty=0.1)
    logits = torch.ones(1, VOCABULARY)
    apply_logits_processors(logits, [sequence], None)
    looked.clear()
    for token in (3, 8):
        sequence.tokens.append(token)
        apply_logits_processors(logits, [sequence], None)
    assert looked == [3, 8]


def test_counts_grow_for_many_new_tokens() -> None:
    counts = TokenCounts([7, 7, 900], start=3)
    tokens = [7, 7, 900, *range(800, 1000), *range(800, 900)]
    counts.follow(tokens)
    said = dict(zip(counts.ids.tolist(), counts.said.tolist(), strict=True))
    assert said == {7: 0.0} | {token: 2.0 if token < 900 else 1.0 for token in range(800, 1000)}


def test_a_bias_becomes_tensors_once_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make = shaping.LogitBias

    def noted(*arguments: Any) -> shaping.LogitBias:
        made.append(make(*arguments))
        return made[-1]  # type: ignore[return-value]

    monkeypatch.setattr(shaping, "LogitBias", noted)
    engine, _, _ = late_engine(async_scheduling=False)
    params = SamplingParams(
        max_tokens=4, n=3, temperature=1.0, logit_bias={5: 100.0, 6: 3.0}, ignore_eos=True
    )
    for name in "ab":
        engine.add(GenerationRequest(name, (1, 2, 3), None, params), None, seed=1)
    tokens = [output.token for output in _run(engine)]
    assert tokens == [5] * 24
    assert len(made) == 2


def _run(engine: Any) -> Iterator[Any]:
    while engine.busy:
        yield from engine.step()
