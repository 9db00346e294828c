"""Request ids, and one log line for each request, without prompts and answers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.errors import RequestFailed
from tests.support.fake_service import FakeService

SECRET = "the launch code"
CHAT: dict[str, Any] = {"model": "poet", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def fields(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = (record for record in caplog.records if record.name == "manylora.access")
    noted: dict[str, Any] = record.__dict__["fields"]
    return noted


@pytest.mark.parametrize("stream", [False, True])
def test_one_line_with_the_figures(
    client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    client.post("/v1/chat/completions", json=CHAT | {"stream": stream, "user": "bob@example.org"})
    line = fields(caplog)
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["adapter"], line["completion_tokens"]) == ("poet", "poet", 3)
    assert (line["prompt_tokens"], line["cached_tokens"]) == (len(SECRET) + 1, 4)
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert line["queue_s"] == 0.25
    assert SECRET not in caplog.text + str(line)
    assert "bob" not in str(line)
    assert len(line["user"]) == 16


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_4", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ('"', False)],
)
def test_sane_request_ids_are_kept(
    client: TestClient, caplog: pytest.LogCaptureFixture, given: str, kept: bool
) -> None:
    answered = client.get("/v1/models", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (answered == given) is kept
    assert fields(caplog)["request_id"] == answered


def test_refusals_are_logged_with_their_code(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.post("/v1/chat/completions", json=CHAT | {"model": "nobody"})
    line = fields(caplog)
    assert (line["status"], line["error"], line["model"]) == (404, "model_not_found", "nobody")
    assert "prompt_tokens" not in line


def test_a_stream_that_fails_is_logged_as_failed(
    client: TestClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.fail_at, service.error = 2, RequestFailed("Processing this request raised.")
    client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    line = fields(caplog)
    assert (line["status"], line["error"], line["completion_tokens"]) == (500, "request_failed", 2)


def test_probes_are_quiet_unless_they_fail(
    client: TestClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    client.get("/health")
    service.dead = "it broke"
    client.get("/health")
    levels = [record.levelno for record in caplog.records if record.name == "manylora.access"]
    assert levels == [logging.DEBUG, logging.INFO]


def test_a_bug_leaves_its_traceback_in_the_log(
    client: TestClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.refusal = ZeroDivisionError("oops")
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
    assert "ZeroDivisionError: oops" in caplog.text
    assert fields(caplog)["status"] == 500
