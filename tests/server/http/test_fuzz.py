"""The server answers any JSON with a status that clients can act on, and never with 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from server.config import from_args
from server.http.app import create_app
from server.http.schema import ChatBody, CompletionBody
from tests.support.fake_service import FakeService, adapter

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = sorted(ChatBody.model_fields | CompletionBody.model_fields)
plausible = st.sampled_from(
    [0, 1, 2, -1, 0.5, "tiny", "poet", "a", [], ["a"], [1], {}, {"1": 1}, True, [[1, 2]]]
)
bodies = st.dictionaries(st.sampled_from(names), plausible | json_values, max_size=6)
start: dict[str, Any] = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
client = TestClient(
    create_app(FakeService(known={"poet": adapter("poet")}), from_args([], {}).http),
    base_url="http://localhost",
)


@pytest.mark.parametrize(
    ("url", "other"), [("/v1/chat/completions", "prompt"), ("/v1/completions", "messages")]
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=bodies)
def test_no_body_is_a_server_error(url: str, other: str, body: dict[str, Any]) -> None:
    valid = {name: value for name, value in start.items() if name != other}
    assert client.post(url, json=valid | body).status_code in (200, 400, 404)


@settings(max_examples=100, deadline=None)
@given(body=json_values, url=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_no_json_is_a_server_error(url: str, body: object) -> None:
    response = client.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40))
def test_no_bytes_are_a_server_error(content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
