"""Metrics: valid, correct, and limited in number."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.config import from_args
from server.engine.interface import EngineStats
from server.http.app import create_app
from server.http.metrics import Metrics
from server.http.record import Record
from tests.support.fake_service import FakeService, adapter


@pytest.fixture
def service() -> FakeService:
    return FakeService(known={name: adapter(name) for name in ("poet", "router")})


@pytest.fixture
def client(service: FakeService) -> TestClient:
    return TestClient(create_app(service, from_args([], {}).http), base_url="http://localhost")


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def scrape(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(response.text)


def test_the_metrics_of_a_request(client: TestClient) -> None:
    body: dict[str, Any] = {"model": "poet", "prompt": "abcd", "max_tokens": 3}
    client.post("/v1/completions", json=body)
    client.post("/v1/completions", json=body | {"model": "tiny", "stream": True})
    client.post("/v1/completions", json=body | {"model": "nobody"})
    found = scrape(client)
    route = ("route", "/v1/completions")
    assert found["manylora_requests_total", (route, ("status", "200"))] == 2
    assert found["manylora_requests_total", (route, ("status", "404"))] == 1
    assert found["manylora_prompt_tokens_total", ()] == 8
    assert found["manylora_generation_tokens_total", ()] == 6
    assert found["manylora_time_to_first_token_seconds_count", ()] == 2
    assert found["manylora_inter_token_seconds_count", ()] == 4
    assert found["manylora_request_seconds_count", ()] == 2
    assert found["manylora_queue_seconds_sum", ()] == 0.5
    assert found["manylora_adapter_requests_total", (("adapter", "poet"),)] == 1
    assert found["manylora_adapter_requests_total", (("adapter", "_base"),)] == 1
    assert found["manylora_adapter_generation_tokens_total", (("adapter", "poet"),)] == 3
    assert found["manylora_adapter_prompt_tokens_total", (("adapter", "poet"),)] == 4
    assert found["manylora_adapter_tier", (("adapter", "poet"), ("tier", "disk"))] == 1
    assert not any(("adapter", "nobody") in labels or ("adapter", "router") in labels for _, labels in found)


def test_the_engines_figures_are_read_at_every_scrape(client: TestClient, service: FakeService) -> None:
    stats = {name: number for number, name in enumerate(EngineStats.__dataclass_fields__, 1)}
    service.stats = lambda: EngineStats(**stats)  # type: ignore[method-assign]
    found = scrape(client)
    values = {value for (name, _), value in found.items() if not name.startswith("manylora_adapter")}
    assert set(stats.values()) <= values  # every field is shown
    assert found["manylora_requests_running", ()] == stats["running"]
    assert found["manylora_preemptions_total", ()] == stats["preemptions"]
    assert found["manylora_adapters", (("state", "ready"), ("tier", "disk"))] == 2
    assert found["manylora_up", ()] == 1
    service.dead = "it broke"
    assert scrape(client)["manylora_up", ()] == 0


def test_the_base_is_named_by_its_digest(client: TestClient) -> None:
    (labels,) = (dict(labels) for name, labels in scrape(client) if name == "manylora_base_info")
    assert (labels["model"], labels["digest"], labels["quantization"]) == ("tiny", "sha256:base", "nf4")


def test_adapters_beyond_the_bound_share_a_label(service: FakeService) -> None:
    metrics = Metrics(service, max_adapters=2)
    for name in ("a", "b", "c", "d", "a"):
        metrics.request("/x", Record("id", generated=True, adapter=name, status=200), 0.1)
    text, _ = metrics.exposition()
    found = samples(text.decode())
    labels = {
        dict(labels)["adapter"]: value
        for (name, labels), value in found.items()
        if name == "manylora_adapter_requests_total"
    }
    assert labels == {"a": 2, "b": 1, "_other": 2}


def test_unknown_paths_share_a_route(client: TestClient) -> None:
    for number in range(3):
        client.get(f"/wp-admin/{number}")
    assert scrape(client)["manylora_requests_total", (("route", "none"), ("status", "404"))] == 3
