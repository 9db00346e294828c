"""Unread output is bounded, and the engine never waits for a reader."""

from __future__ import annotations

import asyncio

import pytest

from server.engine import answer
from server.engine.answer import RunningGeneration
from server.engine.engine import Output
from server.engine.interface import GenerationRequest
from server.engine.sampling.sampler import RankedLogprobs
from server.engine.sampling_params import SamplingParams
from server.engine.tokenizer import Tokenizer
from server.errors import AnswerNotRead
from tests.support.tiny_models import tiny_tokenizer


@pytest.fixture
def cancelled() -> list[bool]:
    return []


@pytest.fixture
def generation(cancelled: list[bool], monkeypatch: pytest.MonkeyPatch) -> RunningGeneration:
    monkeypatch.setattr(answer, "MAX_UNREAD", 10)
    request = GenerationRequest("r", (1,), None, SamplingParams(max_tokens=100))
    return RunningGeneration(
        request,
        Tokenizer(tiny_tokenizer(), 512, frozenset()),
        "tag",
        None,
        lambda: cancelled.append(True),
        lambda _: None,
    )


def output(token: int, logprobs: int = 0) -> Output:
    ranked = RankedLogprobs(0.0, tuple(range(logprobs)), (0.0,) * logprobs) if logprobs else None
    return Output("r", 0, token, logprobs=ranked)


async def test_too_much_unread_output_ends_the_request(
    generation: RunningGeneration, cancelled: list[bool]
) -> None:
    for token in range(11):
        assert not cancelled
        generation.deliver(output(token + 10))
    assert cancelled
    with pytest.raises(AnswerNotRead):
        await anext(aiter(generation))
    assert [delta async for delta in generation] == []


async def test_log_probabilities_count(generation: RunningGeneration, cancelled: list[bool]) -> None:
    for _ in range(3):
        generation.deliver(output(10, logprobs=3))
    assert cancelled


async def test_read_output_no_longer_counts(generation: RunningGeneration, cancelled: list[bool]) -> None:
    deltas = aiter(generation)
    for token in range(50):
        generation.deliver(output(token + 10))
        assert (await asyncio.wait_for(anext(deltas), 5)).token_ids == (token + 10,)
    assert not cancelled
