"""The real ``openai`` client, sync and async, over a real socket."""

from __future__ import annotations

import openai
import pytest

from server.errors import RequestFailed
from tests.support.fake_service import FakeService


def test_chat(live: str) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any") as client:
        answer = client.chat.completions.create(
            model="poet", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=3, logprobs=True
        )
    assert answer.choices[0].message.content == " a b c"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_a_conversation_goes_on_with_what_was_answered(live: str) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any") as client:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        said = answer.choices[0].message
        more = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}, said, {"role": "user", "content": "go on"}],  # type: ignore[list-item]
            max_tokens=3,
        )
    assert more.choices[0].message.content == " a b c"


def test_streaming(live: str) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any") as client:
        stream = client.chat.completions.create(
            model="poet",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == " a b c"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6


async def test_async_streaming_of_completions(live: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="any") as client:
        stream = await client.completions.create(model="router", prompt=["a", "b"], max_tokens=2, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [" a b"] * 2


def test_vllm_extras(live: str, service: FakeService) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any") as client:
        client.completions.create(
            model="tiny", prompt="a", max_tokens=2, extra_body={"top_k": 5, "min_p": 0.1}
        )
    assert (service.requests[-1].sampling.top_k, service.requests[-1].sampling.min_p) == (5, 0.1)


def test_models(live: str) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["tiny", "poet", "router"]
        assert client.models.retrieve("poet").id == "poet"


def test_errors_are_the_client_own(live: str, service: FakeService) -> None:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="poet") as missing:
            client.completions.create(model="poets", prompt="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="poet", prompt="a", temperature=3)
        assert wrong.value.param == "temperature"
        service.fail_at, service.error = 1, RequestFailed("It broke here.")
        stream = client.completions.create(model="poet", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match=r"It broke here\."):
            list(stream)
