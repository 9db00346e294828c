"""The table of fields: the server does what each row says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from starlette.testclient import TestClient

from server.errors import InvalidRequest
from server.http import app, fields
from server.http.body import Body
from server.http.fields import Rule
from server.http.limits import parse_body
from tests.support.fake_service import FakeService

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


def bodies(kind: type[Body] = Body) -> Iterator[type[Body]]:
    """Every model that reads a body or a level of one."""
    for each in kind.__subclasses__():
        if not each.__subclasses__():
            yield each
        yield from bodies(each)


def accepted(rule: Rule) -> list[object]:
    """Values that a field with this rule may have, if the model does not declare it."""
    anything = ["any", {"thing": [1]}, True] if rule.kind == "no effect" else []
    return [None, *rule.neutral, *anything]


@pytest.mark.parametrize("body", list(bodies()), ids=lambda body: body.__name__)
def test_the_table_and_the_models_agree(body: type[Body]) -> None:
    assert body.rules in fields.LEVELS.values()
    kinds = {field: rule.kind for field, rule in body.rules.items()}
    served = {field for field, kind in kinds.items() if kind == "served"}
    assert served <= set(body.model_fields)
    assert all(kinds[field] in ("served", "no effect") for field in body.model_fields)


def test_every_level_has_a_model() -> None:
    """Only the body of an upload is a form instead of JSON."""
    modelled = [body.rules for body in bodies()]
    assert [name for name, rules in fields.LEVELS.items() if rules not in modelled] == ["Upload a file"]
    assert app.CLIENT_ROUTES  # it imports every model


@pytest.mark.parametrize(("url", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_every_row_is_kept(client: TestClient, url: str, body: dict[str, Any]) -> None:
    rules = fields.CHAT if body is CHAT else fields.COMPLETION
    for field, rule in rules.items():
        if rule.kind == "served":
            continue
        checked = field in ("user", "metadata")  # their types are checked
        for value in [None] if checked else accepted(rule):
            response = client.post(url, json=body | {field: value})
            assert response.status_code == 200, (field, value, response.text)
        if rule.kind != "no effect":
            error = client.post(url, json=body | {field: "something else"}).json()["error"]
            assert (error["param"], error["code"]) == (field, "unsupported_parameter")
            assert rule.remedy in error["message"]


EXAMPLES: dict[str, dict[str, Any]] = {
    "StreamOptions": {},
    "Message": {"role": "assistant", "content": "hi"},
    "Part": {"type": "text", "text": "hi"},
    "LoadAdapter": {"lora_name": "a", "lora_path": "a"},
    "UnloadAdapter": {"lora_name": "a"},
    "CreateJob": {"model": "tiny", "training_file": "file-1"},
    "Method": {"type": "supervised"},
    "Supervised": {},
    "Hyperparameters": {},
}
WHOLE = ("ChatBody", "CompletionBody")


def test_every_level_below_has_an_example() -> None:
    assert {body.__name__ for body in bodies()} == {*EXAMPLES, *WHOLE}


@pytest.mark.parametrize(
    "body", [each for each in bodies() if each.__name__ not in WHOLE], ids=lambda body: body.__name__
)
def test_every_row_of_the_levels_below_is_kept(body: type[Body]) -> None:
    example = EXAMPLES[body.__name__]
    for field, rule in body.rules.items():
        if rule.kind == "served":
            continue
        for value in accepted(rule):
            parse_body(json.dumps(example | {field: value}).encode(), body)
        if rule.kind != "no effect":
            with pytest.raises(InvalidRequest, match=re.escape(rule.remedy)) as caught:
                parse_body(json.dumps(example | {field: "something else"}).encode(), body)
            assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize("empty", ["", [], {}])
def test_only_messages_and_their_parts_drop_empty_fields(empty: object) -> None:
    for body in bodies():
        data = json.dumps(EXAMPLES.get(body.__name__, {}) | {"mood": empty}).encode()
        if body.__name__ in ("Message", "Part"):
            parse_body(data, body)
        else:
            with pytest.raises(InvalidRequest, match="'mood' is not supported"):
                parse_body(data, body)


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "metadata": {"a": "b"}},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"reasoning_effort": "none", "service_tier": "flex", "store": False, "verbosity": "low"},
        {"top_logprobs": 0, "logprobs": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_real_clients_send_is_accepted(client: TestClient, asked: dict[str, Any]) -> None:
    assert client.post("/v1/chat/completions", json=CHAT | asked).status_code == 200


def test_an_answer_goes_back_as_it_was_dumped(client: TestClient, service: FakeService) -> None:
    """Clients keep the message object, and send it back with all its nulls."""
    answer = ChatCompletion.model_validate(client.post("/v1/chat/completions", json=CHAT).json())
    dumped = answer.choices[0].message.model_dump()
    assert dumped["tool_calls"] is None
    kept = [
        {"role": "user", "content": "hi", "name": "bob"},
        dumped,
        {"role": "assistant", "content": None, "tool_calls": [], "annotations": [], "mood": {}, "x": ""},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "a", "provider_specific_fields": {"refusal": None}},  # litellm's
        {"role": "user", "content": "again"},
    ]
    assert client.post("/v1/chat/completions", json=CHAT | {"messages": kept}).status_code == 200
    assert [message["content"] for message in service.conversations[-1]] == [
        "hi",
        " a b",
        "",
        "go on",
        "a",
        "again",
    ]


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_calls_are_named_as_the_cause(client: TestClient, content: dict[str, Any]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]} | content]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["error"]
    assert error["param"] == "messages.1.tool_calls"
    assert error["message"].startswith("'messages.1.tool_calls' is not supported; this server does not read")


def test_only_an_assistants_message_may_be_empty(client: TestClient) -> None:
    messages = [{"role": "user", "content": None}]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["error"]
    assert (error["param"], error["code"]) == ("messages.0.content", "missing_required_parameter")


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "No."},
        {"refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": "No.", "refusal": None},
    ],
)
def test_a_refusal_is_what_the_assistant_said(
    client: TestClient, service: FakeService, answer: dict[str, Any]
) -> None:
    messages = [*CHAT["messages"], {"role": "assistant"} | answer, {"role": "user", "content": "Why?"}]
    assert client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).status_code == 200
    assert [message["content"] for message in service.conversations[-1]] == ["hi", "No.", "Why?"]


def test_a_refusal_beside_content_is_not_lost(client: TestClient) -> None:
    messages = [{"role": "assistant", "content": "Well.", "refusal": "No."}]
    error = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["error"]
    assert (error["param"], error["code"]) == ("messages.0.refusal", "unsupported_parameter")


def test_the_most_answers_are_the_same_as_at_openai(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=CHAT | {"n": 128}).json()
    assert len(answer["choices"]) == 128
