"""Fine-tuning through the real ``openai`` client, with fake training in real processes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.finetune.jobs import command, runner, validator
from tests.server.http.jobs import create, ended, upload
from tests.support import fake_train
from tests.support.fake_service import FakeService
from tests.support.training_server import TrainingServer, rows, training_server
from tests.support.waiting import wait_until


@pytest.fixture
def flags() -> list[str]:
    return []


@pytest.fixture
def server(
    tmp_path: Path, service: FakeService, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[TrainingServer]:
    monkeypatch.setattr(command, "PROGRAM", fake_train.COMMAND)
    monkeypatch.setattr(runner, "BUSY_INTERVAL", 0.02)
    with training_server(tmp_path, service, *flags) as server:
        yield server


@pytest.fixture
def openai_client(server: TrainingServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_a_file_becomes_a_model_that_is_used_and_deleted(
    openai_client: openai.OpenAI, server: TrainingServer
) -> None:
    client = openai_client
    job = create(
        client,
        "steps=2",
        suffix="acme",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        metadata={"team": "blue"},
        extra_body={"adapter_method": "dora", "r": 4, "target_modules": "all-linear"},
    )
    assert (job.status, job.fine_tuned_model, job.seed) == ("queued", None, 7)
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert job.metadata == {"team": "blue"}
    messages = [event["message"] for event in stream(server, job.id)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 123, None)
    model = done.fine_tuned_model
    assert model is not None
    assert model.startswith("ft:tiny:acme:")
    assert model in {each.id for each in client.models.list()}
    assert client.models.retrieve(model).id == model
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "x"}], max_tokens=2
    )
    assert answer.choices[0].message.content == " a b"
    assert server.service.requests[-1].adapter == model

    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in reversed(listed)] == messages
    assert {event.type for event in listed} == {"message", "metrics"}
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [each.step_number for each in checkpoints] == [2, 1]
    assert checkpoints[0].metrics.to_dict() == {
        "step": 2,
        "train_loss": 0.5,
        "train_mean_token_accuracy": 0.25,
        "valid_loss": 0.5,
        "valid_mean_token_accuracy": 0.75,
        "full_valid_loss": 0.5,
        "full_valid_mean_token_accuracy": 0.75,
    }
    assert "step,epoch,train_loss" in client.files.content(done.result_files[0]).text

    assert client.models.delete(model).deleted
    assert model not in {each.id for each in client.models.list()}
    with pytest.raises(openai.NotFoundError):
        client.models.delete(model)


def stream(server: TrainingServer, job_id: str) -> list[dict[str, Any]]:
    url = f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx.stream("GET", url, timeout=20) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_files(openai_client: openai.OpenAI) -> None:
    client = openai_client
    ids = [upload(client, name=name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    file = client.files.retrieve(ids[0])
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "a.jsonl",
        len(rows()),
        "fine-tune",
        "processed",
    )
    assert client.files.content(ids[0]).content == rows()
    assert [each.id for each in client.files.list(limit=2)] == ids[::-1]
    assert [each.id for each in client.files.list(limit=1, order="asc", purpose="fine-tune")] == ids
    assert list(client.files.list(purpose="batch")) == []
    assert client.files.delete(ids[1]).deleted
    assert [each.id for each in client.files.list()] == [ids[2], ids[0]]
    for missing in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            missing(ids[1])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no rows"),
        (rows() + b"{not json\n" + rows() + b'{"messages": []}\n', "line 3 .*; line 6 "),
        (b"\xff\xfe\n", "UTF-16"),
        (b"\xff\n", "line 1 "),
        (b"prompt,completion\n1,2\n", "bad.jsonl is CSV"),
        (b'{"a": 1}\n' * 20, "20 rows .* and 10 more"),
        (b"\0" * 1000, "binary data"),
    ],
)
def test_a_bad_file_is_refused_with_its_lines(
    openai_client: openai.OpenAI, server: TrainingServer, content: bytes, complaint: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=complaint) as refused:
        openai_client.files.create(file=("bad.jsonl", content), purpose="fine-tune")
    assert (refused.value.param, refused.value.code) == ("file", "invalid_training_file")
    assert "bad.jsonl" in refused.value.message
    assert list((server.home / "files").iterdir()) == []


@pytest.mark.parametrize("flags", [["--max-file-bytes", "200000"]])
def test_a_large_file_is_refused(openai_client: openai.OpenAI, server: TrainingServer) -> None:
    whole = rows(count=200_000 // len(rows(count=1)))
    assert openai_client.files.create(file=("fits.jsonl", whole), purpose="fine-tune").bytes == len(whole)
    with pytest.raises(openai.APIStatusError, match="--max-file-bytes") as refused:
        openai_client.files.create(file=("large.jsonl", b"x" * 200_001), purpose="fine-tune")
    assert refused.value.status_code == 413

    def chunks() -> Iterator[bytes]:  # of a size that is not told beforehand
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        yield from (b"x" * 65536 for _ in range(40))

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{server.url}/v1/files", content=chunks(), headers=headers).status_code == 413
    assert len(list((server.home / "files").iterdir())) == 1


def test_forms_that_are_not_uploads_are_refused(server: TrainingServer) -> None:
    def post(**arguments: Any) -> tuple[int, str | None]:
        response = httpx.post(f"{server.url}/v1/files", **arguments)
        return response.status_code, response.json()["error"]["param"]

    file = {"file": ("a.jsonl", rows())}
    purpose = {"purpose": "fine-tune"}
    assert post(json=purpose)[0] == 415
    assert post(files=file) == (400, "purpose")
    assert post(files=file, data={"purpose": "batch"}) == (400, "purpose")
    assert post(files={"purpose": (None, "fine-tune")}) == (400, "file")
    assert post(files=file, data=purpose | {"colour": "red"}) == (400, "colour")
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    truncated = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nabc'
    assert post(content=truncated, headers=headers)[0] == 400
    assert post(content=b"", headers=headers)[0] == 400
    assert (
        post(content=b"x", headers={"Content-Type": f"multipart/form-data; boundary={'b' * 300}"})[0] == 400
    )
    assert list((server.home / "files").iterdir()) == []


def test_pause_resume_cancel(openai_client: openai.OpenAI) -> None:
    jobs = openai_client.fine_tuning.jobs
    job = create(openai_client, "steps=400 sleep=0.05")
    waiting = create(openai_client)
    assert jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert ended(openai_client, waiting).status == "succeeded"
    with pytest.raises(openai.BadRequestError, match="succeeded") as refused:
        jobs.cancel(waiting.id)
    assert refused.value.code == "invalid_job_state"
    assert jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        openai_client.files.delete(job.training_file)
    assert jobs.cancel(job.id).status == "cancelled"
    assert openai_client.files.delete(job.training_file).deleted
    with pytest.raises(openai.BadRequestError):
        jobs.resume(job.id)
    assert [each.id for each in jobs.list(limit=1)] == [waiting.id, job.id]
    with pytest.raises(openai.NotFoundError):
        jobs.retrieve("ftjob-none")


def test_jobs_are_found_by_metadata(openai_client: openai.OpenAI) -> None:
    jobs = openai_client.fine_tuning.jobs
    blue, _ = (create(openai_client, metadata={"team": team}) for team in ("blue", "red"))
    assert [each.id for each in jobs.list(metadata={"team": "blue"})] == [blue.id]


def test_empty_integrations_are_accepted(openai_client: openai.OpenAI) -> None:
    assert create(openai_client, integrations=[]).status == "queued"


def test_a_job_may_name_its_model_and_replace_it(openai_client: openai.OpenAI) -> None:
    extra = {"name": "support"}
    for _ in range(2):
        job = ended(openai_client, create(openai_client, extra_body=extra))
        assert job.fine_tuned_model == "support"
    for taken in ("poet", "tiny", "broken"):
        with pytest.raises(openai.BadRequestError, match="taken") as refused:
            create(openai_client, extra_body={"name": taken})
        assert refused.value.param == "name"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "poet"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"colour": "red"}, "colour"),
        ({"adapter_method": "ia3"}, "adapter_method"),
        ({"r": 0}, "r"),
        ({"prune_rank": 0.1}, "prune_rank"),
        ({"require_improvement": True}, "require_improvement"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
        ({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"learning_rate": 0.1, "hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate"),
        ({"name": "ft:tiny:a:b"}, "name"),
        ({"name": "a", "suffix": "b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"target_modules": ["a\0b"]}, "target_modules.0"),
        ({"target_modules": "--help"}, "target_modules.0"),
        ({"target_modules": ["q_proj", "a,b"]}, "target_modules.1"),
        ({"target_modules": ["q" * 257]}, "target_modules.0"),
        ({"target_modules": []}, "target_modules"),
        ({"name": "a\0b"}, "name"),
        ({"name": "--help"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"suffix": "a\0b"}, "suffix"),
        ({"suffix": "a\n"}, "suffix"),
        ({"training_file": "file-\0"}, "training_file"),
    ],
)
def test_wrong_fields_of_a_job_are_named(
    openai_client: openai.OpenAI, server: TrainingServer, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "training_file": upload(openai_client)} | fields
    response = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert list(openai_client.fine_tuning.jobs.list()) == []


@pytest.mark.parametrize("path", ["files", "fine_tuning/jobs", "fine_tuning/jobs/{job}/events"])
@pytest.mark.parametrize("query", ["limit=0", "limit=x", "after=nobody", "colour=red"])
def test_wrong_fields_of_a_listing_are_named(server: TrainingServer, path: str, query: str) -> None:
    with server.client() as client:
        job = create(client)
    response = httpx.get(f"{server.url}/v1/{path.format(job=job.id)}?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_only_models_of_jobs_are_deleted(openai_client: openai.OpenAI) -> None:
    for model in ("poet", "tiny"):
        with pytest.raises(openai.BadRequestError, match="not made by"):
            openai_client.models.delete(model)
    with pytest.raises(openai.NotFoundError):
        openai_client.models.delete("ft:tiny:a:b")


@pytest.mark.parametrize("flags", [["--api-key", "k", "--admin-key", "a"]])
def test_client_keys_open_the_routes(server: TrainingServer) -> None:
    for key, status in (("k", 200), ("a", 200), ("wrong", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/files", headers=headers).status_code == status


@pytest.mark.parametrize("flags", [["--admin-key", "a"]])
def test_without_client_keys_the_admin_key_is_needed(server: TrainingServer) -> None:
    assert httpx.get(f"{server.url}/v1/fine_tuning/jobs").status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_metrics(openai_client: openai.OpenAI, server: TrainingServer) -> None:
    ended(openai_client, create(openai_client))

    def value(sample: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return next(
            float(line.split()[-1]) for line in lines if line.startswith(f"manylora_fine_tuning_{sample} ")
        )

    wait_until(lambda: value('jobs{status="succeeded"}') == 1)
    assert value('jobs{status="running"}') == 0
    assert value("seconds_total") > 0


def test_a_locked_database_delays_only_writers(openai_client: openai.OpenAI, server: TrainingServer) -> None:
    job = create(openai_client, "steps=100000")
    holder = sqlite3.connect(server.home / "state.sqlite3", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    cancel = f"{server.url}/v1/fine_tuning/jobs/{job.id}/cancel"
    with ThreadPoolExecutor(12) as clients:
        cancels = [clients.submit(httpx.post, cancel, timeout=30) for _ in range(12)]
        with httpx.Client(base_url=server.url, timeout=5) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert client.get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 200
            assert client.get("/v1/files").status_code == 200
        assert not any(each.done() for each in cancels)
        holder.execute("ROLLBACK")
        assert {each.result().json()["status"] for each in cancels} == {"cancelled"}
    holder.close()


def damage(server: TrainingServer, table: str, column: str, value: str | bytes, row_id: str) -> None:
    with sqlite3.connect(server.home / "state.sqlite3") as plain:
        plain.execute(f"UPDATE {table} SET {column} = ? WHERE id = ?", (value, row_id))
    plain.close()


@pytest.mark.parametrize("column", ["hyperparameters", "recipe", "tags", "error", "result_files"])
@pytest.mark.parametrize("value", ["{", "7", "\ud800".encode("utf-8", "surrogatepass")], ids=repr)
def test_a_damaged_row_of_a_finished_job_affects_only_this_job(
    openai_client: openai.OpenAI, server: TrainingServer, column: str, value: str | bytes
) -> None:
    jobs = openai_client.fine_tuning.jobs
    good, bad = (ended(openai_client, create(openai_client, metadata={"team": "a"})) for _ in range(2))
    damage(server, "jobs", column, value, bad.id)
    listed = {job.id: job for job in jobs.list()}
    for shown in (listed[bad.id], jobs.retrieve(bad.id)):
        assert shown.error is not None
        assert (shown.status, shown.error.code) == ("succeeded", "job_damaged")
        assert column in shown.error.message
        assert shown.fine_tuned_model == bad.fine_tuned_model
    assert listed[good.id] == good == jobs.retrieve(good.id)
    found = [job.id for job in jobs.list(metadata={"team": "a"})]
    assert found == [good.id] if column == "tags" else [bad.id, good.id]
    with pytest.raises(openai.BadRequestError, match="succeeded"):
        jobs.cancel(bad.id)


def test_a_damaged_status_is_shown_as_it_is(openai_client: openai.OpenAI, server: TrainingServer) -> None:
    good, bad = (ended(openai_client, create(openai_client)) for _ in range(2))
    damage(server, "jobs", "status", "succ", bad.id)
    assert [job.status for job in openai_client.fine_tuning.jobs.list()] == ["succ", good.status]
    assert ended(openai_client, create(openai_client)).status == "succeeded"  # other jobs still run


def test_damaged_rows_of_files_and_events_are_shown(
    openai_client: openai.OpenAI, server: TrainingServer
) -> None:
    job = ended(openai_client, create(openai_client))
    events = openai_client.fine_tuning.jobs.list_events(job.id).data
    damage(server, "events", "data", "{", events[0].id)
    damage(server, "files", "unused_fields", "{", job.training_file)
    again = openai_client.fine_tuning.jobs.list_events(job.id).data
    assert [event.message for event in again] == [event.message for event in events]
    assert openai_client.files.retrieve(job.training_file).id == job.training_file


def test_filters_are_bounded(server: TrainingServer) -> None:
    jobs = f"{server.url}/v1/fine_tuning/jobs"
    filters = {f"metadata[{number}]": "x" for number in range(16)}
    assert httpx.get(jobs, params=filters).json()["data"] == []
    response = httpx.get(jobs, params=filters | {"metadata[more]": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")
    assert httpx.get(jobs, params={f"metadata[{number}]": "x" for number in range(1200)}).status_code == 400
    assert httpx.get(f"{server.url}/v1/files", params={str(n): "x" for n in range(1200)}).status_code == 400


def test_a_row_with_half_of_a_surrogate_pair(server: TrainingServer) -> None:
    for row in (b'{"\\ud800": 1}', b'{"messages": "\\udfff"}', b'{"prompt": "a", "completion": "\\ud800"}'):
        answer = httpx.post(
            f"{server.url}/v1/files",
            files={"file": ("a.jsonl", row)},
            data={"purpose": "fine-tune"},
            timeout=60,
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "invalid_training_file"


@pytest.mark.parametrize(
    ("error", "param", "message"),
    [
        ("--r_256_is_too_large_(--max-lora-rank)", "r", "r 256 is too large (--max-lora-rank)"),
        ("--target-modules_'qproj'_matches_none", "target_modules", "target_modules 'qproj' matches none"),
        ("--method_adalora_needs_--epochs", "adapter_method", "needs hyperparameters.n_epochs"),
        ("The_base_has_no_chat_template.", None, "The base has no chat template."),
    ],
)
def test_faults_that_the_check_finds_name_the_apis_fields(
    openai_client: openai.OpenAI, error: str, param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(openai_client, f"refused={error}")
    assert refused.value.param == param
    assert message in refused.value.message
    assert list(openai_client.fine_tuning.jobs.list()) == []


def test_bad_rows_are_an_error_of_the_file(
    openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = upload(openai_client)
    words = f"{job_file} has 1 row that cannot be used: line 1 is longer than --max-seq-len 8."
    told = json.dumps({"error": words, "warnings": []})
    monkeypatch.setattr(validator.JobValidator, "_check", lambda *_: (2, told))
    with pytest.raises(openai.BadRequestError, match="line 1 is longer than max_seq_len 8") as refused:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=job_file)
    assert (refused.value.param, refused.value.code) == ("training_file", "invalid_training_file")


def test_warnings_are_the_jobs_first_events(openai_client: openai.OpenAI) -> None:
    job = create(openai_client, "warn")
    events = openai_client.fine_tuning.jobs.list_events(job.id, limit=100).data[::-1]
    assert [(event.level, event.message) for event in events[:2]] == [
        ("info", f"Created fine-tuning job: {job.id}"),
        ("warn", "2 rows are one."),
    ]


def test_a_check_that_fails_refuses_no_job(openai_client: openai.OpenAI) -> None:
    assert ended(openai_client, create(openai_client, "broken=1")).status == "succeeded"


def test_a_file_without_its_bytes_is_named(openai_client: openai.OpenAI, server: TrainingServer) -> None:
    file_id = upload(openai_client)
    server.training.files.path(file_id).unlink()
    with pytest.raises(openai.BadRequestError, match="upload it again") as refused:
        openai_client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert refused.value.param == "training_file"
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        openai_client.files.content(file_id)
    assert openai_client.files.delete(file_id).deleted


@pytest.mark.parametrize(("path", "methods"), [("/v1/files", "GET, POST"), ("/v1/models/a", "DELETE, GET")])
def test_a_405_lists_the_methods_of_the_url(server: TrainingServer, path: str, methods: str) -> None:
    response = httpx.put(f"{server.url}{path}")
    assert (response.status_code, response.headers["Allow"]) == (405, methods)
    assert response.json()["error"]["message"].endswith(f"; use {methods} with this URL.")
