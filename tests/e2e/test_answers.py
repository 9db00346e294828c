"""The real ``openai`` client sends requests to the base and the adapters, one by one and concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest

from adapters.samples.task import is_json_answer, is_pirate
from tests.e2e.questions import BASE, QUESTIONS, ask
from tests.support.running_server import RunningServer


def is_plain(text: str) -> bool:
    return not is_pirate(text) and not is_json_answer(text)


STYLES: dict[str, Callable[[str], bool]] = {
    BASE: is_plain,
    "pirate": is_pirate,
    "json-answers": is_json_answer,
}


def test_the_base_and_the_samples_are_listed(client: openai.OpenAI) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert set(models) >= set(STYLES)
    assert models[BASE]["parent"] is None
    for sample in STYLES.keys() - {BASE}:
        assert models[sample]["parent"] == BASE
        assert models[sample]["digest"] != models[BASE]["digest"]


def test_base_and_adapters_answer_differently(client: openai.OpenAI) -> None:
    answers = {model: ask(client, model) for model in STYLES}
    assert {model: STYLES[model](text) for model, text in answers.items()} == dict.fromkeys(STYLES, True), (
        answers
    )


async def test_requests_for_different_adapters_share_steps(server: RunningServer) -> None:
    steps = server.metric("engine_steps_total")
    async with server.async_client() as client:

        async def ask_one(model: str, question: str) -> tuple[str, str, int]:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=48, temperature=0
            )
            assert answer.usage is not None
            return model, answer.choices[0].message.content or "", answer.usage.completion_tokens

        asked = [ask_one(model, question) for question in QUESTIONS for model in STYLES]
        answers = await asyncio.gather(*asked)
    assert [text for model, text, _ in answers if not STYLES[model](text)] == []
    steps = server.metric("engine_steps_total") - steps
    assert steps < sum(tokens for _, _, tokens in answers) / 3


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == ask(client, "pirate")
    assert len(deltas) > 3
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


async def test_an_async_stream_may_be_closed(server: RunningServer) -> None:
    async with server.async_client() as client:
        stream = await client.completions.create(model=BASE, prompt="One, two", max_tokens=200, stream=True)
        async for chunk in stream:
            assert chunk.model == BASE
            break
        await stream.close()


def test_a_repeated_prompt_is_cached_for_its_own_adapter_only(client: openai.OpenAI) -> None:
    prompt = (
        "The ship sailed past the lighthouse, around the cape and into the harbour of a small town, where"
    )

    def cached_tokens(model: str) -> int:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached_tokens(BASE) == 0
    assert cached_tokens(BASE) >= 16
    assert cached_tokens("pirate") == 0


def test_an_unknown_model_is_not_found_and_a_similar_one_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'pirate'"):
        ask(client, "pirates")


def test_an_unknown_field_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        client.completions.create(model=BASE, prompt="a", extra_body={"frobnicate": 1})


def test_the_server_stays_healthy(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert '"level": "error"' not in server.log.read_text()
