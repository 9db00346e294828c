"""Every error has a row in the table."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from adapters.errors import AdapterError, AdapterOutOfMemory
from server.errors import InvalidRequest, OutOfMemory, RequestError, ShuttingDown
from server.http.errors import INTERNAL, SHAPES, HttpError, code_of, error_body, error_response, shape_of


def leaves(cls: type[BaseException]) -> Iterator[type[BaseException]]:
    below = cls.__subclasses__()
    if not below:
        yield cls
    for each in below:
        yield from leaves(each)


def test_every_kind_of_failed_request_has_its_own_row() -> None:
    ours = {
        each
        for tree in (RequestError, AdapterError)
        for each in leaves(tree)
        if "bench" not in each.__module__
    }
    assert len(ours) > 15
    assert {each.__name__ for each in ours if each not in SHAPES} == set()


def test_rows_have_statuses_of_errors() -> None:
    assert all(400 <= shape.status < 600 for shape in SHAPES.values())
    assert shape_of(KeyError()) is INTERNAL
    assert shape_of(HttpError("?")) is INTERNAL


def test_an_error_own_code_goes_first() -> None:
    assert code_of(InvalidRequest("no", "n", "invalid_value")) == "invalid_value"
    assert error_body(InvalidRequest("no", "n"))["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }


@pytest.mark.parametrize("kind", [ShuttingDown, OutOfMemory, AdapterOutOfMemory])
def test_errors_that_may_pass_have_retry_after(kind: type[Exception]) -> None:
    response = error_response(kind("not now"))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize(
    ("method", "path", "code", "hint"),
    [
        ("POST", "/v1/embeddings", "unknown_url", "docs/api.md"),
        ("POST", "/chat/completions", "unknown_url", "Did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", "unknown_url", "Did you mean /v1/chat/completions?"),
        ("POST", "//v1/chat/completions", "unknown_url", "Did you mean /v1/chat/completions?"),
        ("GET", "/v1/health", "unknown_url", "Did you mean /health?"),
        ("GET", "/", "unknown_url", "docs/api.md"),
        ("GET", "/v1/chat/completions", "method_not_supported", "POST"),
        ("POST", "/v1/models/tiny", "method_not_supported", "GET"),
    ],
)
def test_an_unknown_url_is_not_a_missing_model(
    client: TestClient, method: str, path: str, code: str, hint: str
) -> None:
    error = client.request(method, f"http://localhost{path}").json()["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert hint in error["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/poet", "/health", "/v1/adapters"])
def test_a_last_slash_makes_no_difference(client: TestClient, path: str) -> None:
    assert client.get(f"{path}/").json() == client.get(path).json()


def test_an_error_may_contain_half_of_a_surrogate_pair() -> None:
    """Names on the disk and rows of files may contain one. UTF-8 cannot encode it, but JSON can escape it."""
    response = error_response(InvalidRequest("Row 1 has \ud800 in it.", "file\udcff"))
    told = json.loads(bytes(response.body))["error"]
    assert (told["message"], told["param"]) == ("Row 1 has \ud800 in it.", "file\udcff")


def test_error_codes_are_only_ours() -> None:
    """SQLAlchemy's errors have their own codes. They mean nothing to clients."""

    class LibraryError(Exception):
        code, param = "e3q8", "insides"

    assert error_body(LibraryError())["error"]["code"] == "internal_error"
    assert error_body(LibraryError())["error"]["param"] is None
