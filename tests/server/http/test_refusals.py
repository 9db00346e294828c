"""Every refusal has its status, and names the field and the remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.errors import EngineDead, InvalidRequest, OutOfMemory, QueueFull, RequestFailed
from tests.server.http.conftest import MakeClient
from tests.support.fake_service import FakeService, adapter

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi"}


def post(client: TestClient, url: str, body: object) -> tuple[int, dict[str, Any]]:
    response = client.post(url, json=body)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


WRONG_IN_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 1 << 63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"temprature": ""}, "temprature"),
    ({"lora_path": "poet"}, "lora_path"),
    ({"extra_body": {"top_k": 1}}, "extra_body"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"best_of": True}, "best_of"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"temprature": 1}, "temprature"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH, ids=lambda value: json.dumps(value)[:40])
@pytest.mark.parametrize(("url", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_a_wrong_field_is_named(
    client: TestClient,
    service: FakeService,
    url: str,
    body: dict[str, Any],
    fields: dict[str, Any],
    param: str,
) -> None:
    status, error = post(client, url, body | fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"]
    assert not service.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "mood": "sad"}]}, "messages.0.mood"),
        ({"messages": [{"role": "user", "content": "x", "mood": False}]}, "messages.0.mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}]},
            "messages.0.content.0.refusal",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "refusal": "y"}]}]},
            "messages.0.content.0.refusal",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_field_of_chat_is_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    status, error = post(client, "/v1/chat/completions", CHAT | fields)
    assert status == 400
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 26}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_field_of_completions_is_named(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    status, error = post(client, "/v1/completions", TEXT | fields)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"content": 5},
            "'messages.0.content': must be a string, or a list of parts such as {'type': 'text'",
        ),
        (
            {"content": []},
            "'messages.0.content': must be a string, or a list of parts such as {'type': 'text'",
        ),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            "'messages.0.content.0.image_url' is not supported; conversations are text, so",
        ),
    ],
)
def test_the_error_lists_the_kinds_of_content(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    body = CHAT | {"messages": [{"role": "user"} | fields]}
    assert post(client, "/v1/chat/completions", body)[1]["message"].startswith(message)


def test_errors_do_not_repeat_the_librarys_words(client: TestClient) -> None:
    _, error = post(client, "/v1/chat/completions", CHAT | {"stop": ["a"] * 17})
    assert error["message"] == "'stop': Value should have at most 16 items, not 17."


def test_unsupported_fields_have_a_clear_error(client: TestClient) -> None:
    _, error = post(client, "/v1/chat/completions", CHAT | {"temprature": 1})
    assert error["code"] == "unsupported_parameter"
    assert error["message"] == "'temprature' is not supported; leave it out."
    _, error = post(client, "/v1/chat/completions", CHAT | {"tool_choice": "required"})
    assert error["message"] == (
        "'tool_choice' is not supported; this server does not call tools, so leave it out."
    )
    _, error = post(client, "/v1/chat/completions", CHAT | {"best_of": 2})
    assert error["message"] == "'best_of' is not supported; leave it out, or send 1."


class TestTheContext:
    """litellm, langchain and agents search for these words, and then shorten the conversation."""

    def test_an_answer_that_does_not_fit(self, client: TestClient) -> None:
        status, error = post(client, "/v1/completions", TEXT | {"prompt": [1] * 40, "max_tokens": 30})
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert error["message"] == (
            "This model's maximum context length is 64 tokens. However, you requested 70 tokens "
            "(40 in the prompt, 30 in the completion). Please reduce the length of the prompt or completion."
        )
        _, error = post(client, "/v1/chat/completions", CHAT | {"max_tokens": 62})
        assert error["param"] == "messages"
        assert "65 tokens (3 in the messages, 62 in the completion)" in error["message"]

    def test_a_prompt_that_does_not_fit(self, client: TestClient) -> None:
        long = [{"role": "user", "content": "x" * 63}]
        status, error = post(client, "/v1/chat/completions", CHAT | {"messages": long})
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert error["message"] == (
            "This model's maximum context length is 64 tokens. However, your messages resulted in 64 tokens. "
            "Please reduce the length of the messages."
        )


def test_the_last_token_of_the_context_can_be_used(client: TestClient) -> None:
    response = client.post("/v1/completions", json=TEXT | {"prompt": [1] * 63})
    assert response.json()["usage"]["completion_tokens"] == 1


class TestModels:
    def test_errors_of_unknown_names_suggest_similar_names(
        self, client: TestClient, service: FakeService
    ) -> None:
        status, error = post(client, "/v1/chat/completions", CHAT | {"model": "poets"})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'poet'" in error["message"]
        assert "broken" not in post(client, "/v1/chat/completions", CHAT | {"model": "brokem"})[1]["message"]
        assert not service.requests

    def test_similar_names_are_found_among_thousands(self, client: TestClient, service: FakeService) -> None:
        names = [f"team-{number:04}" for number in range(3000)]
        service.known |= {name: adapter(name) for name in (*names, "router-de")}
        _, error = post(client, "/v1/chat/completions", CHAT | {"model": "router-ed"})
        assert "'router-de'" in error["message"]

    def test_a_failed_adapter_has_a_reason_and_the_base_never_answers(
        self, client: TestClient, service: FakeService
    ) -> None:
        status, error = post(client, "/v1/chat/completions", CHAT | {"model": "broken"})
        assert (status, error["code"]) == (404, "model_unavailable")
        assert "all zero" in error["message"]
        assert not service.requests

    def test_a_draining_adapter(self, client: TestClient, service: FakeService) -> None:
        service.known["poet"] = adapter("poet", state="draining")
        status, error = post(client, "/v1/completions", TEXT | {"model": "poet"})
        assert (status, error["code"]) == (404, "model_unavailable")


class TestEngine:
    def test_a_full_queue_has_retry_after(self, client: TestClient, service: FakeService) -> None:
        service.refusal = QueueFull("512 requests wait.", retry_after=7)
        response = client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        assert response.json()["error"]["type"] == "rate_limit_error"

    def test_out_of_memory_has_retry_after(self, client: TestClient, service: FakeService) -> None:
        service.fail_at, service.error = 0, OutOfMemory("The device has too little memory left.")
        response = client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "out_of_memory"

    def test_draining(self, client: TestClient, service: FakeService) -> None:
        service.is_draining = True
        response = client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in response.headers

    def test_a_dead_engine(self, client: TestClient, service: FakeService) -> None:
        service.refusal = EngineDead("The engine's loop has ended.")
        assert post(client, "/v1/chat/completions", CHAT)[0] == 503

    def test_the_engine_finds_a_wrong_field(self, client: TestClient, service: FakeService) -> None:
        service.refusal = InvalidRequest("Token 9 is not in the vocabulary.", "prompt")
        status, error = post(client, "/v1/completions", TEXT)
        assert (status, error["param"], error["message"]) == (
            400,
            "prompt",
            "Token 9 is not in the vocabulary.",
        )

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_failure_before_the_first_token_is_a_status(
        self, client: TestClient, service: FakeService, stream: bool
    ) -> None:
        service.fail_at, service.error = 0, RequestFailed("Processing this request raised.")
        status, error = post(client, "/v1/chat/completions", CHAT | {"stream": stream})
        assert (status, error["code"]) == (500, "request_failed")
        assert not service.running

    def test_a_later_failure_is_an_event(self, client: TestClient, service: FakeService) -> None:
        service.fail_at, service.error = 2, RequestFailed("Processing this request raised.")
        response = client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert response.status_code == 200
        *_, last, rest = response.text.split("\n\n")
        assert rest == ""
        event, data = last.split("\n")
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "request_failed"
        assert not service.running

    @pytest.mark.parametrize("fail_at", [0, 1])
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_client_does_not_see_details_of_a_bug(
        self, client: TestClient, service: FakeService, stream: bool, fail_at: int
    ) -> None:
        service.fail_at, service.error = fail_at, ValueError("secret detail")
        response = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        assert response.status_code == (200 if stream and fail_at else 500)
        assert "internal_error" in response.text
        assert "secret" not in response.text
        assert not service.running

    def test_one_failing_prompt_ends_all(self, client: TestClient, service: FakeService) -> None:
        service.fail_at, service.error = 1, RequestFailed("Processing this request raised.")
        assert post(client, "/v1/completions", TEXT | {"prompt": ["a", "b", "c"]})[0] == 500
        assert not service.running


class TestBodies:
    def send(self, client: TestClient, content: bytes, kind: str = "application/json") -> tuple[int, str]:
        response = client.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
        return response.status_code, response.json()["error"]["message"]

    def test_the_media_type_must_be_json(self, client: TestClient) -> None:
        """A browser sends other media types to other origins without a preflight request."""
        assert self.send(client, json.dumps(CHAT).encode(), "text/plain")[0] == 415

    def test_a_charset_is_accepted(self, client: TestClient) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8"}
        assert (
            client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers).status_code == 200
        )

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"nonsense", b'{"model": NaN}', b'{"model": "a}', b'{"a":1}x']
    )
    def test_not_json(self, client: TestClient, content: bytes) -> None:
        assert self.send(client, content)[0] == 400

    @pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"text"'])
    def test_not_an_object(self, client: TestClient, content: bytes) -> None:
        assert self.send(client, content)[0] == 400

    def test_not_utf8(self, client: TestClient) -> None:
        status, message = self.send(client, b'{"model": "\xff"}')
        assert (status, message) == (400, "The body is not valid UTF-8 at byte 11.")

    def test_a_lone_surrogate(self, client: TestClient) -> None:
        assert self.send(client, rb'{"model": "\ud800"}')[0] == 400

    def test_too_deep(self, client: TestClient) -> None:
        status, message = self.send(client, b"[" * 100_000 + b"]" * 100_000)
        assert status == 400
        assert "recursion limit" in message

    @pytest.mark.parametrize("declared", [True, False])
    def test_too_large(self, make_client: MakeClient, declared: bool) -> None:
        client = make_client(max_body_bytes=1024)
        content: Any = b" " * 1025 if declared else iter([b" " * 600, b" " * 600])
        status, message = self.send(client, content)
        assert status == 413
        assert "1024" in message

    def test_a_huge_number(self, client: TestClient) -> None:
        assert self.send(client, b'{"model": "tiny", "prompt": ' + b"9" * 10_000 + b"}")[0] == 400


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert client.get("/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/v1/chat/completions").headers["allow"] == "POST"
