"""The table of fields: what asks for nothing is accepted, and every row is kept."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from starlette.testclient import TestClient

from server.http import fields
from server.http.fields import Rules
from server.http.schema import Body, ChatBody, CompletionBody, Message, StreamOptions, TextPart
from tests.support.fake_service import FakeService

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
BODIES: list[tuple[type[Body], Rules]] = [
    (ChatBody, fields.CHAT),
    (CompletionBody, fields.COMPLETION),
    (StreamOptions, fields.STREAM_OPTIONS),
    (Message, fields.MESSAGE),
    (TextPart, fields.PART),
]


@pytest.mark.parametrize(("body", "rules"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_table_and_the_models_say_the_same(body: type[Body], rules: Rules) -> None:
    assert body.rules is rules
    served = {field for field, rule in rules.items() if rule.kind == "served"}
    assert served == set(body.model_fields)


@pytest.mark.parametrize(("url", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_every_row_is_kept(client: TestClient, url: str, body: dict[str, Any]) -> None:
    rules = fields.CHAT if body is CHAT else fields.COMPLETION
    for field, rule in rules.items():
        if rule.kind == "served":
            continue
        for value in (
            *rule.neutral,
            None,
            *(["any", {"thing": [1]}, True] if rule.kind == "no effect" else []),
        ):
            response = client.post(url, json=body | {field: value})
            assert response.status_code == 200, (field, value, response.text)
        if rule.kind != "no effect":
            error = client.post(url, json=body | {field: "something else"}).json()["error"]
            assert (error["param"], error["code"]) == (field, "unsupported_parameter")
            assert rule.remedy in error["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"prompt_cache_key": "k", "safety_identifier": "s"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"reasoning_effort": "none", "service_tier": "default", "store": True},
        {"top_logprobs": 0, "logprobs": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_real_clients_send_is_accepted(client: TestClient, asked: dict[str, Any]) -> None:
    assert client.post("/v1/chat/completions", json=CHAT | asked).status_code == 200


def test_an_answer_goes_back_as_it_was_dumped(client: TestClient, service: FakeService) -> None:
    """Clients keep the message object, and send it with all its nulls the next time."""
    answer = ChatCompletion.model_validate(client.post("/v1/chat/completions", json=CHAT).json())
    dumped = answer.choices[0].message.model_dump()
    assert dumped["tool_calls"] is None
    kept = [
        {"role": "user", "content": "hi", "name": "bob"},
        dumped,
        {"role": "assistant", "content": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "again"},
    ]
    assert client.post("/v1/chat/completions", json=CHAT | {"messages": kept}).status_code == 200
    assert [message["content"] for message in service.conversations[-1]] == ["hi", " a b", "", "again"]


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_calls_are_named_as_the_cause(client: TestClient, content: dict[str, Any]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]} | content]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["error"]
    assert error["param"] == "messages.1.tool_calls"
    assert error["message"].startswith("'messages.1.tool_calls' is not supported; this server reads no tool")


def test_only_an_assistant_may_have_said_nothing(client: TestClient) -> None:
    messages = [{"role": "user", "content": None}]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["error"]
    assert (error["param"], error["code"]) == ("messages.0.content", "missing_required_parameter")
