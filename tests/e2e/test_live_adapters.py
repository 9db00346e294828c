"""Adapters are added, changed and removed while the server runs, in the folder and by the admin routes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.samples.task import FOLDER
from tests.e2e.questions import BASE, ask
from tests.support.running_server import RunningServer
from tests.support.waiting import wait_until

NOTICED = 2.0
"""The promised seconds until a change in the adapter directory is served."""


@pytest.fixture
def deployed(server: RunningServer) -> Iterator[Path]:
    """The folder of the adapter ``newcomer``. It is removed after the test."""
    folder = server.adapters / "newcomer"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    wait_until(lambda: listed(server, folder.name) is None, NOTICED)


def deploy(source: Path, target: Path) -> None:
    """Copy the adapter under a name that the server ignores, and rename it, as the documentation advises."""
    copy, old = target.with_suffix(".tmp"), target.with_suffix(".old.tmp")
    shutil.copytree(source, copy)
    if target.exists():
        target.rename(old)
    copy.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def listed(server: RunningServer, name: str) -> dict[str, Any] | None:
    """The adapter's row of ``GET /v1/adapters``."""
    rows: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/adapters").raise_for_status().json()["data"]
    return next((row for row in rows if row["name"] == name), None)


def is_served_as(server: RunningServer, name: str, digest: str) -> bool:
    row = listed(server, name)
    return row is not None and row["state"] == "ready" and row["digest"] == digest


def digest_of(server: RunningServer, name: str) -> str:
    row = listed(server, name)
    assert row is not None
    digest: str = row["digest"]
    return digest


def test_a_folder_is_served_replaced_and_removed(
    server: RunningServer, client: openai.OpenAI, deployed: Path
) -> None:
    for sample in ("pirate", "json-answers"):
        deploy(FOLDER / sample, deployed)
        digest = digest_of(server, sample)
        wait_until(lambda digest=digest: is_served_as(server, "newcomer", digest), NOTICED)  # type: ignore[misc]
        assert ask(client, "newcomer") == ask(client, sample)
    shutil.rmtree(deployed)
    wait_until(lambda: listed(server, "newcomer") is None, NOTICED)
    with pytest.raises(openai.NotFoundError):
        ask(client, "newcomer")


def test_a_broken_folder_fails_alone_with_its_reason(
    server: RunningServer, client: openai.OpenAI, deployed: Path
) -> None:
    broken = server.home / "broken"
    shutil.copytree(FOLDER / "pirate", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    broken.rename(deployed)
    wait_until(lambda: (listed(server, "newcomer") or {}).get("state") == "failed", NOTICED)
    row = listed(server, "newcomer")
    assert row is not None
    assert "adapter_model.safetensors" in row["reason"]
    with pytest.raises(openai.NotFoundError, match="could not be loaded"):
        ask(client, "newcomer")
    assert "newcomer" not in {model.id for model in client.models.list()}
    assert ask(client, BASE)
    assert ask(client, "pirate")


def test_an_adapter_is_loaded_and_unloaded_by_request(server: RunningServer, client: openai.OpenAI) -> None:
    def post(action: str, **body: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body)

    assert post("load", lora_name="alias", lora_path="pirate").status_code == 200
    assert ask(client, "alias") == ask(client, "pirate")
    assert post("load", lora_name="alias", lora_path="json-answers").status_code == 400
    assert post("load", lora_name="alias", lora_path="json-answers", load_inplace=True).status_code == 200
    assert ask(client, "alias") == ask(client, "json-answers")
    assert post("unload", lora_name="alias").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "alias")
    assert post("unload", lora_name="alias").status_code == 404


@pytest.mark.parametrize("path", ["/etc", "../bases", str(FOLDER / "pirate")])
def test_nothing_is_loaded_from_elsewhere(server: RunningServer, path: str) -> None:
    body = {"lora_name": "alias", "lora_path": path}
    refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert listed(server, "alias") is None
