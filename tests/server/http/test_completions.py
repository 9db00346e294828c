"""Plain completions: all kinds of prompts, several prompts at once, and the older shape of logprobs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.fake_service import FakeService

URL = "/v1/completions"


def complete(client: TestClient, prompt: object, **fields: Any) -> dict[str, Any]:
    response = client.post(URL, json={"model": "tiny", "prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [(97, 98)]),
        (["a", "bc"], [(97,), (98, 99)]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
def test_prompts(
    client: TestClient, service: FakeService, prompt: object, tokens: list[tuple[int, ...]]
) -> None:
    answer = complete(client, prompt, model="poet", max_tokens=2)
    assert [request.prompt for request in service.requests] == tokens
    assert {request.adapter for request in service.requests} == {"poet"}
    assert [choice["text"] for choice in answer["choices"]] == [" a b"] * len(tokens)
    assert answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_the_default_is_sixteen_tokens(client: TestClient) -> None:
    assert complete(client, "a")["usage"]["completion_tokens"] == 16
    assert complete(client, "a" * 60)["usage"]["completion_tokens"] == 4


def test_choices_are_counted_prompt_by_prompt(client: TestClient) -> None:
    answer = complete(client, ["a", "b", "c"], n=2, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 12


def test_a_stream_of_several_prompts(client: TestClient) -> None:
    fields = {"n": 2, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post(URL, json={"model": "tiny", "prompt": ["a", "b"]} | fields)
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    *chunks, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    texts, ends = [""] * 4, [0] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] += choice["finish_reason"] == "length"
    assert (texts, ends) == ([" a b"] * 4, [1] * 4)
    assert usage["usage"]["total_tokens"] == 10


def test_logprobs_are_parallel_lists(client: TestClient) -> None:
    logprobs = complete(client, "a", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [" a", " b", " c"]
    assert logprobs["text_offset"] == [0, 2, 4]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[" a", " b"], [" b", " c"], [" c", " d"]]
    assert logprobs["token_logprobs"] == [
        top[token] for top, token in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True)
    ]


def test_streamed_logprobs_continue_their_offsets(client: TestClient) -> None:
    response = client.post(
        URL, json={"model": "tiny", "prompt": "a", "max_tokens": 3, "logprobs": 0, "stream": True}
    )
    chunks = [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [2], [4]]


def test_one_refused_prompt_refuses_the_whole_request(client: TestClient, service: FakeService) -> None:
    response = client.post(URL, json={"model": "tiny", "prompt": ["a", "b" * 64]})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not service.running
