"""``GET /openapi.json`` describes what the server does: schemathesis finds no difference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route
from starlette.testclient import TestClient

from server.http import app
from server.http.fields import LEVELS
from server.http.openapi import BODIES, document
from tests.support.fake_service import FakeService
from tests.support.training_server import TrainingServer, training_server

ALL_ROUTES = (
    *app.PROBE_ROUTES,
    *app.CLIENT_ROUTES,
    *app.METRICS_ROUTES,
    *app.TRAINING_ROUTES,
    *app.ADMIN_ROUTES,
)
DOCUMENT = document([Route(path, endpoint, methods=[method]) for method, path, endpoint in ALL_ROUTES])
OPERATIONS = {
    each.ok().label: each.ok()
    for each in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
    if isinstance(each, Ok)
}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    with training_server(tmp_path_factory.mktemp("home"), FakeService()) as server:
        yield server


def name_model(case: schemathesis.Case[Any]) -> None:
    """Replace a valid name by that of a served model. Otherwise nearly every request would get a 404."""
    if isinstance(case.body, dict):
        model = case.body.get("model")
        if isinstance(model, str) and 1 <= len(model) <= 256:
            case.body["model"] = "tiny"


def compare(server: TrainingServer, label: str, mode: schemathesis.GenerationMode) -> None:
    """Send requests that the description allows, or forbids, and check the answers against it."""

    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=4 if label == "POST /v1/files" else 20,  # each upload is checked in a process
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case[Any]) -> None:
        name_model(case)
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    check()


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_described(server: TrainingServer, label: str) -> None:
    compare(server, label, schemathesis.GenerationMode.POSITIVE)


@pytest.mark.parametrize("label", [label for label, each in OPERATIONS.items() if each.body or each.query])
def test_what_the_description_forbids_is_refused(server: TrainingServer, label: str) -> None:
    compare(server, label, schemathesis.GenerationMode.NEGATIVE)


def test_every_route_is_described(client: TestClient) -> None:
    served = client.get("/openapi.json").json()
    assert set(served["paths"]) < set(DOCUMENT["paths"])  # this app has no fine-tuning
    described = {(method.upper(), path) for path, each in DOCUMENT["paths"].items() for method in each}
    assert described == {(method, path.replace(":path", "")) for method, path, _ in ALL_ROUTES}


def test_the_schemas_are_valid() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert {model.__name__ for model in BODIES.values()} <= set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_every_field_of_the_table_is_described() -> None:
    described = [set(each["properties"]) for each in DOCUMENT["components"]["schemas"].values()]
    assert [name for name, rules in LEVELS.items() if set(rules) not in described] == ["Upload a file"]
