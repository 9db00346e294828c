"""Chat completions: the engine's requests, and the client's answers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.engine.sampling_params import SamplingDefaults, SamplingParams
from tests.support.fake_service import FakeService, adapter

URL = "/v1/chat/completions"


def chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | fields
    response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    response = client.post(URL, json=body | fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_whole_answer(client: TestClient) -> None:
    answer = chat(client, model="poet")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "poet"
    assert answer["system_fingerprint"] == "nf4-base-lora-poet"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " a b c", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_a_stream_has_the_same_answer(client: TestClient) -> None:
    first, *deltas, last = (chunk["choices"][0] for chunk in stream(client))
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in (*deltas, last)] == [{"content": f" {letter}"} for letter in "abc"]
    assert [choice["finish_reason"] for choice in (first, *deltas, last)] == [None, None, None, "length"]


def test_chunks_of_a_stream_share_one_envelope(client: TestClient) -> None:
    chunks = stream(client, model="poet")
    envelopes = [{key: chunk[key] for key in chunk if key != "choices"} for chunk in chunks]
    assert envelopes == [envelopes[0]] * len(chunks)
    assert envelopes[0]["object"] == "chat.completion.chunk"
    assert envelopes[0]["system_fingerprint"] == "nf4-base-lora-poet"
    assert "usage" not in envelopes[0]


def test_a_stream_with_usage_ends_with_it(client: TestClient) -> None:
    *chunks, last = stream(client, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_usage_in_every_chunk(client: TestClient) -> None:
    """vLLM's option. It needs ``include_usage``, as in vLLM."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(client, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6)
    alone = stream(client, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in alone)


def test_several_answers(client: TestClient) -> None:
    answer = chat(client, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 9
    chunks = stream(client, n=2)
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [" a b c"] * 2
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3]] == [
        "assistant",
        "assistant",
        None,
    ]


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs(client: TestClient, top: int) -> None:
    logprobs = chat(client, logprobs=True, top_logprobs=top)["choices"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs["content"]] == [" a", " b", " c"]
    assert logprobs["content"][0]["bytes"] == [32, 97]
    assert [len(entry["top_logprobs"]) for entry in logprobs["content"]] == [top] * 3
    streamed = [chunk["choices"][0]["logprobs"] for chunk in stream(client, logprobs=True, top_logprobs=top)]
    assert [entry for part in streamed[1:] for entry in part["content"]] == logprobs["content"]


def test_conversations_reach_the_template(client: TestClient, service: FakeService) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    chat(client, messages=messages)
    assert service.conversations == [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one\ntwo"},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": ""},
        ]
    ]


def test_every_sampling_field_reaches_the_engine(client: TestClient, service: FakeService) -> None:
    fields = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.2,
        "seed": -3,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "n": 2,
    }
    lists = {"logit_bias": {"5": -100, "6": 1.5}, "stop": ["x", "yy"], "stop_token_ids": [4]}
    chat(client, **fields, **lists, logprobs=True, top_logprobs=3)
    sampling = service.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert (sampling.stop, sampling.stop_token_ids, sampling.logprobs) == (("x", "yy"), (4,), 3)


DEFAULTS = SamplingDefaults(
    temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=7
)


@pytest.mark.parametrize("model", ["tiny", "poet"])
def test_absent_and_null_fields_get_the_bases_defaults(
    client: TestClient, service: FakeService, model: str
) -> None:
    service.base = replace(service.base, defaults=DEFAULTS)
    service.known["poet"] = adapter("poet")
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    client.post("/v1/chat/completions", json=body | {"temperature": None, "top_k": None})
    assert service.requests[-1].sampling == SamplingParams(**asdict(DEFAULTS))
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    client.post("/v1/chat/completions", json=body | given | {"max_tokens": 30})
    assert service.requests[-1].sampling == SamplingParams(max_tokens=30)
    client.post("/v1/completions", json={"model": model, "prompt": "hi"})
    assert service.requests[-1].sampling == SamplingParams(**asdict(DEFAULTS) | {"max_tokens": 16})


def test_absent_fields_get_openais_defaults(client: TestClient, service: FakeService) -> None:
    chat(client, max_tokens=None)
    assert service.requests[-1].sampling == SamplingParams(max_tokens=61)  # all that the context leaves


@pytest.mark.parametrize(
    "fields",
    [
        {"max_completion_tokens": 2, "max_tokens": None},
        {"max_completion_tokens": 2, "max_tokens": 2},
        {"stop": "one", "max_tokens": 2},
        {"top_k": -1, "max_tokens": 2},
        {"temperature": None, "tools": None, "unheard_of": None, "max_tokens": 2},
        {
            "store": False,
            "tools": [],
            "modalities": ["text"],
            "response_format": {"type": "text"},
            "max_tokens": 2,
        },
        {"metadata": {"job": "7"}, "max_tokens": 2},
    ],
)
def test_fields_without_effect_are_accepted(
    client: TestClient, service: FakeService, fields: dict[str, Any]
) -> None:
    assert chat(client, **fields)["choices"][0]["message"]["content"] == " a b"
    assert service.requests[-1].sampling.top_k == 0


def test_request_ids_of_the_engine_are_unique(client: TestClient, service: FakeService) -> None:
    for _ in range(2):
        client.post(
            URL,
            json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
            headers={"X-Request-Id": "same"},
        )
    assert len({request.request_id for request in service.requests}) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_runs_after_an_answer(client: TestClient, service: FakeService, streamed: bool) -> None:
    client.post(
        URL, json={"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": streamed}
    )
    assert service.requests
    assert not service.running
