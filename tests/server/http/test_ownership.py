"""Clients can replace and delete the results of fine-tuning jobs, but never an operator's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server.finetune.jobs import command, runner
from tests.server.http.jobs import create, ended
from tests.support import fake_train
from tests.support.fake_service import FakeService, adapter
from tests.support.training_server import TrainingServer, training_server
from tests.support.waiting import wait_until

NAMED = {"name": "acme"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", fake_train.COMMAND)
    monkeypatch.setattr(runner, "BUSY_INTERVAL", 0.02)
    monkeypatch.setattr(runner, "IDLE_INTERVAL", 0.02)


@pytest.fixture
def server(tmp_path: Path, service: FakeService) -> Iterator[TrainingServer]:
    with training_server(tmp_path, service) as server:
        yield server


@pytest.fixture
def client(server: TrainingServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def deploy(home: Path, text: str = "the operator's") -> Path:
    """An operator's folder ``acme``."""
    folder = home / "adapters" / "acme"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def is_deployed(folder: Path) -> bool:
    return (folder / "adapter_config.json").read_text() == "the operator's"


def test_a_paused_job_never_replaces_what_was_deployed_meanwhile(
    client: openai.OpenAI, server: TrainingServer
) -> None:
    job = create(client, "steps=1000 sleep=0.02", extra_body=NAMED)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 20)
    client.fine_tuning.jobs.pause(job.id)
    folder = deploy(server.home)
    client.fine_tuning.jobs.resume(job.id)
    failed = ended(client, job)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "'acme' is taken by a model that no fine-tuning job has made" in str(failed.error.message)
    assert is_deployed(folder)


def test_a_job_that_ends_never_replaces_an_operators_folder(
    client: openai.OpenAI, server: TrainingServer
) -> None:
    job = create(client, "steps=20 sleep=0.05", extra_body=NAMED)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 20)
    wait_until(lambda: len(list(client.fine_tuning.jobs.list_events(job.id))) > 3, 20)
    server.service.known["acme"] = adapter("acme", path="/srv/adapters/acme-v2")  # loaded by hand
    assert ended(client, job).status == "failed"
    assert server.service.known["acme"].path == "/srv/adapters/acme-v2"
    assert not (server.home / "adapters" / "acme").exists()


def test_an_operators_folder_in_place_of_a_jobs_is_not_deleted(
    client: openai.OpenAI, server: TrainingServer
) -> None:
    assert ended(client, create(client, extra_body=NAMED)).status == "succeeded"
    folder = deploy(server.home)
    with pytest.raises(openai.BadRequestError, match="not made by a fine-tuning job"):
        client.models.delete("acme")
    assert is_deployed(folder)
    assert server.service.has_adapter("acme")
    with pytest.raises(openai.BadRequestError, match="taken"):
        create(client, extra_body=NAMED)


def test_a_name_registered_for_another_folder_is_kept(client: openai.OpenAI, server: TrainingServer) -> None:
    assert ended(client, create(client, extra_body=NAMED)).status == "succeeded"
    server.service.known["acme"] = adapter("acme", path="/srv/adapters/acme-v2")
    with pytest.raises(openai.BadRequestError, match="not made by a fine-tuning job"):
        client.models.delete("acme")
    assert server.service.has_adapter("acme")
    assert (server.home / "adapters" / "acme").is_dir()


def test_a_folder_that_comes_while_it_is_deleted_stays(
    client: openai.OpenAI, server: TrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(client, create(client, extra_body=NAMED)).status == "succeeded"
    unload = server.service.unload_adapter

    async def deploy_meanwhile(name: str) -> None:
        await unload(name)
        deploy(server.home)

    monkeypatch.setattr(server.service, "unload_adapter", deploy_meanwhile)
    with pytest.raises(openai.NotFoundError):
        client.models.delete("acme")
    assert is_deployed(server.home / "adapters" / "acme")


def test_ownership_outlives_the_server(tmp_path: Path, service: FakeService) -> None:
    for delete in (False, True):
        with training_server(tmp_path, service) as server, server.client() as client:
            assert ended(client, create(client, extra_body=NAMED)).status == "succeeded"
            if delete:
                assert client.models.delete("acme").deleted
    assert not (tmp_path / "adapters" / "acme").exists()


def test_cancelling_a_job_keeps_a_folder_that_an_operator_deployed(
    client: openai.OpenAI, server: TrainingServer
) -> None:
    job = create(client, "steps=1000 sleep=0.02", extra_body=NAMED)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 20)
    folder = deploy(server.home)
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: not (server.home / "jobs" / job.id / "checkpoints").exists(), 20)
    assert is_deployed(folder)


def test_names_that_cannot_be_served_are_refused_at_once(client: openai.OpenAI) -> None:
    odd = [
        "acme.tmp",
        "acme.partial",
        "ft_3aacme",
        "ft:tiny:a:b",
        "../acme",
        ".acme",
        "a" * 129,
        "a\nb",
        "a b",
    ]
    for name in odd:
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, extra_body={"name": name})
        assert refused.value.param == "name", name
