"""The list of models, and single models."""

from __future__ import annotations

from dataclasses import replace

from starlette.testclient import TestClient

from server.engine.sampling_params import SamplingDefaults
from tests.support.fake_service import FakeService, adapter

BASE = {
    "id": "tiny",
    "object": "model",
    "created": 1000,
    "owned_by": "manylora",
    "max_model_len": 64,
    "root": "tiny",
    "parent": None,
    "digest": "sha256:base",
    "quantization": "nf4",
    "head_quantization": "none",
    "default_sampling_params": {},
}
POET = {
    "id": "poet",
    "object": "model",
    "created": 2000,
    "owned_by": "manylora",
    "max_model_len": 64,
    "root": "poet",
    "parent": "tiny",
    "digest": "sha256:poet",
}


def test_the_base_and_every_ready_adapter(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"][:2] == [BASE, POET]
    assert [card["id"] for card in listed["data"]] == ["tiny", "poet", "router"]


def test_one_model(client: TestClient) -> None:
    assert client.get("/v1/models/tiny").json() == BASE
    assert client.get("/v1/models/poet").json() == POET
    assert client.get("/v1/models/pot").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/broken").json()["error"]["code"] == "model_unavailable"


def test_served_names_replace_the_base_own_name(client: TestClient, service: FakeService) -> None:
    service.base = replace(service.base, served_names=("gpt", "org/chat"))
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards[:3]] == [
        ("gpt", "tiny", None),
        ("org/chat", "tiny", None),
        ("poet", "poet", "gpt"),
    ]
    assert client.get("/v1/models/org/chat").status_code == 200
    for model, status in (("gpt", 200), ("org/chat", 200), ("tiny", 404)):
        body = {"model": model, "prompt": "a"}
        assert client.post("/v1/completions", json=body).status_code == status
    assert {request.adapter for request in service.requests} == {None}


def test_the_disk_is_not_shown_to_clients(client: TestClient, service: FakeService) -> None:
    service.known["poet"] = adapter("poet", path="/srv/secret/place/v2")
    text = client.get("/v1/models").text
    assert "secret" not in text
    assert '"root":"v2"' in text


def test_an_unknown_name_is_looked_up_before_it_is_refused(client: TestClient, service: FakeService) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for path, fields in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": messages})):
        name = path.replace("/", "-")
        service.on_disk[name] = adapter(name)
        response = client.post(f"/v1/{path}", json={"model": name, "max_tokens": 1, **fields})
        assert (response.status_code, service.requests[-1].adapter) == (200, name)
    service.on_disk["new2"] = adapter("new2")
    assert client.get("/v1/models/new2").json()["id"] == "new2"
    assert client.get("/v1/models/new3").status_code == 404
    service.looked_for.clear()
    assert client.get("/v1/models/tiny").status_code == 200
    assert service.looked_for == []


def test_a_request_for_a_waiting_adapter_may_be_retried(client: TestClient, service: FakeService) -> None:
    reason = "adapter_model.safetensors is not there yet."
    service.known["new"] = adapter("new", state="waiting", digest=None, tier=None, reason=reason)
    response = client.post("/v1/completions", json={"model": "new", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_not_ready")
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["message"] == f"Adapter 'new' is not served yet: {reason}"
    assert "new" not in [card["id"] for card in client.get("/v1/models").json()["data"]]
    listed = client.get("/v1/adapters").json()["data"][-1]
    assert (listed["state"], listed["reason"]) == ("waiting", reason)


def test_an_adapter_may_be_named_with_its_base(client: TestClient, service: FakeService) -> None:
    answer = client.post("/v1/completions", json={"model": "tiny:poet", "prompt": "a", "max_tokens": 1})
    assert (answer.status_code, service.requests[-1].adapter) == (200, "poet")
    assert answer.json()["model"] == "tiny:poet"
    assert client.get("/v1/models/tiny:poet").json() == POET
    service.on_disk["new"] = adapter("new")
    assert client.get("/v1/models/tiny:new").json()["id"] == "new"
    service.base = replace(service.base, served_names=("gpt", "org/chat:v1"))
    assert client.get("/v1/models/org/chat:v1:poet").json()["id"] == "poet"
    for unknown, code in (
        ("tiny:poet", "model_not_found"),
        ("gpt:", "model_not_found"),
        ("gpt:gpt", "model_not_found"),
        ("gpt:broken", "model_unavailable"),
        ("other:poet", "model_not_found"),
    ):
        response = client.post("/v1/completions", json={"model": unknown, "prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, code)
    hint = client.get("/v1/models/gpt:pot").json()["error"]["message"]
    assert hint == "The model 'gpt:pot' does not exist; did you mean 'poet'?"


def test_a_whole_name_has_precedence_over_base_and_adapter(client: TestClient, service: FakeService) -> None:
    service.base = replace(service.base, served_names=("ft",))
    service.known |= {name: adapter(name) for name in ("ft:poet", "ft_3apoet")}
    assert client.get("/v1/models/ft:poet").json()["id"] == "ft:poet"


def test_the_bases_card_shows_the_sampling_defaults(client: TestClient, service: FakeService) -> None:
    service.base = replace(service.base, defaults=SamplingDefaults(temperature=0.6, top_k=20))
    card = client.get("/v1/models/tiny").json()
    assert card["default_sampling_params"] == {"temperature": 0.6, "top_k": 20}


def test_an_unknown_name_costs_little_among_thousands(client: TestClient, service: FakeService) -> None:
    service.known |= {f"a{number}": adapter(f"a{number}") for number in range(5000)}
    service.adapters = None  # type: ignore[method-assign, assignment]  # nobody lists them all for it
    message = client.get("/v1/models/a499x").json()["error"]["message"]
    assert "did you mean 'a499" in message
    assert client.get("/v1/models/a4999").json()["id"] == "a4999"
