"""The probes distinguish alive from ready."""

from __future__ import annotations

from starlette.testclient import TestClient

from tests.support.fake_service import FakeService


def statuses(client: TestClient) -> tuple[int, int]:
    return client.get("/health").status_code, client.get("/ready").status_code


def test_alive_and_ready(client: TestClient) -> None:
    assert statuses(client) == (200, 200)


def test_draining_is_alive_but_not_ready(client: TestClient, service: FakeService) -> None:
    service.is_draining = True
    assert statuses(client) == (200, 503)


def test_a_dead_engine_has_a_reason(client: TestClient, service: FakeService) -> None:
    service.dead = "ValueError: out of blocks"
    assert statuses(client) == (503, 503)
    assert client.get("/health").json()["reason"] == "ValueError: out of blocks"


def test_version(client: TestClient) -> None:
    version = client.get("/version").json()
    assert set(version) == {"version", "attention", "weight_bytes"}
    assert version["attention"] == "fake"
    assert version["weight_bytes"] == {"nf4": 900, "bf16": 300, "bf16_experts": 0}
