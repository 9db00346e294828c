"""The admin routes. Their answers are vLLM's."""

from __future__ import annotations

from dataclasses import replace

from starlette.testclient import TestClient

from tests.support.fake_service import FakeService


def test_load_use_replace_unload(client: TestClient, service: FakeService) -> None:
    body = {"lora_name": "new", "lora_path": "folder"}
    response = client.post("/v1/load_lora_adapter", json=body)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert client.post("/v1/completions", json={"model": "new", "prompt": "a"}).status_code == 200
    assert client.post("/v1/load_lora_adapter", json=body).json()["error"]["code"] == "adapter_exists"
    again = body | {"lora_path": "other", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=again).status_code == 200
    assert service.known["new"].path == "other"
    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


def test_an_adapter_cannot_take_the_base_name(client: TestClient, service: FakeService) -> None:
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "tiny", "lora_path": "folder"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name")
    assert "tiny" not in service.known


def test_unknown_fields_are_refused(client: TestClient) -> None:
    body = {"lora_name": "new", "lora_path": "folder", "lora_int_id": 3}
    assert client.post("/v1/load_lora_adapter", json=body).json()["error"]["param"] == "lora_int_id"


def test_vllms_number_of_an_adapter_is_accepted_and_ignored(client: TestClient) -> None:
    client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "folder"})
    body = {"lora_name": "new", "lora_int_id": 3}
    assert client.post("/v1/unload_lora_adapter", json=body).status_code == 200


def test_the_list_has_everything_and_the_reasons(client: TestClient) -> None:
    listed = client.get("/v1/adapters").json()
    assert listed["object"] == "list"
    poet, _, broken = listed["data"]
    assert (poet["name"], poet["state"], poet["digest"], poet["rank"]) == ("poet", "ready", "sha256:poet", 8)
    assert (poet["nbytes"], poet["tier"], poet["in_flight"], poet["last_used"]) == (1024, "disk", 0, None)
    assert (broken["state"], broken["reason"]) == ("failed", "its tensors are all zero.")


def test_the_base_may_be_named(client: TestClient, service: FakeService) -> None:
    body = {"lora_name": "new", "lora_path": "folder", "load_inplace": True}
    for same in ("tiny", "some-lab/Tiny", "/models/tiny", None):
        response = client.post("/v1/load_lora_adapter", json=body | {"base_model_name": same})
        assert response.status_code == 200, same
    service.base = replace(service.base, served_names=("gpt",))
    assert client.post("/v1/load_lora_adapter", json=body | {"base_model_name": "gpt"}).status_code == 200
    del service.known["new"]
    response = client.post("/v1/load_lora_adapter", json=body | {"base_model_name": "some-lab/Large"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "base_model_name")
    assert error["message"].startswith(
        "'base_model_name' is 'some-lab/Large', but this server's base is 'gpt'"
    )
    assert "new" not in service.known
