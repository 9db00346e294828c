"""Jobs as child processes: they run, pause, resume, end, crash, and outlive their server."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import JSON
from sqlalchemy.orm import Session

from adapters.paths import folder_name
from server.finetune.jobs import runner
from server.finetune.jobs.database import Job
from server.finetune.jobs.finisher import MAX_DEATHS
from server.finetune.jobs.process import Child
from server.finetune.jobs.store import JobRequest, find_job
from tests.server.finetune.jobs.room import Room
from tests.support.waiting import wait_until


def pid_of(job: Job) -> int:
    assert job.child
    return int(job.child.partition(":")[0])


def is_running(job: Job) -> bool:
    return job.status == "running" and bool(job.child) and job.metrics_read > 0


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_job_trains_and_its_model_is_served(room: Room) -> None:
    job = room.create(
        "steps=2", suffix="acme", recipe={"r": 8, "packing": True, "target_modules": ["q", "v"]}
    )
    room.begin_runner()
    done = room.wait(job, "succeeded")
    assert room.models.served == {done.fine_tuned_model}
    assert done.fine_tuned_model.startswith("ft:base:acme:")
    assert (done.trained_tokens, done.error) == (123, None)
    assert done.finished_at is not None
    assert done.seconds > 0
    assert room.steps(job) == [1, 2]
    assert room.messages(job) == [
        f"Created fine-tuning job: {job.id}",
        "Fine-tuning job started",
        "Training: start",
        "Step 1/2: training loss=1.0000",
        "Checkpoint created at step 1",
        "Step 2/2: training loss=0.5000",
        "Checkpoint created at step 2",
        "Step 2/2: validation loss=0.5000",
        "The job has successfully completed",
    ]
    folder = room.models.folder / folder_name(done.fine_tuned_model)
    given = json.loads((folder / "adapter_config.json").read_text())
    assert (given["r"], given["packing"], given["target_modules"]) == ("8", True, "q,v")
    assert (given["epochs"], given["duty"], given["seed"]) == (None, "1", str(job.seed))
    (results,) = done.result_files
    assert room.files.path(results).read_text().splitlines() == [
        "step,epoch,train_loss,train_mean_token_accuracy,full_valid_loss,full_valid_mean_token_accuracy,"
        "learning_rate",
        "1,0.5,1.0,,,,",
        "2,1.0,0.5,,,,",
        "2,,,,0.5,0.75,",
    ]


@pytest.mark.parametrize(
    ("orders", "code", "message"),
    [
        ("fail", "out_of_memory", "There is no memory left."),
        ("kept", "not_improved", "It is no better than the base."),
        ("crash", "training_failed", "it broke"),
        (
            f"die=1 steps=3 every=9 x={MAX_DEATHS}",
            "process_died",
            "The training process was killed by SIGKILL.",
        ),
    ],
)
def test_a_failed_job_has_a_reason(room: Room, orders: str, code: str, message: str) -> None:
    job = room.create(orders)
    room.begin_runner()
    failed = room.wait(job, "failed")
    assert failed.error == {"code": code, "message": message, "param": None}
    assert room.messages(job)[-1] == f"Fine-tuning job failed: {message}"
    assert room.messages(job).count("Training: start") == (MAX_DEATHS if "die" in orders else 1)
    assert not room.models.served


def test_an_adapter_that_cannot_be_served_is_removed(room: Room) -> None:
    job = room.create(suffix="refused")
    room.begin_runner()
    failed = room.wait(job, "failed")
    assert failed.error is not None
    assert failed.error["code"] == "adapter_refused"
    assert list(room.models.folder.iterdir()) == []


def test_a_job_that_crashes_resumes_from_its_checkpoint(room: Room) -> None:
    job = room.create("steps=4 die=3")
    room.begin_runner()
    assert room.wait(job, "succeeded", "failed").status == "failed"  # it crashes at step 3 in each attempt
    assert room.steps(job) == [1, 2, 3, 3, 3]


def test_a_killed_child_is_resumed(room: Room) -> None:
    job = room.create("steps=120 sleep=0.02")
    room.begin_runner()
    for kills in range(1, 11):
        running = room.wait_for(job, is_running)
        begun = len(room.steps(job))
        room.wait_for(job, lambda now, begun=begun: now.child != "" and len(room.steps(now)) > begun)  # type: ignore[misc]
        os.kill(pid_of(running), signal.SIGKILL)
        room.wait_for(job, lambda now, pid=running.child: now.child != pid)  # type: ignore[misc]
        assert room.jobs.get(job.id).status != "failed", kills
    room.wait(job, "succeeded")
    assert set(room.steps(job)) == set(range(1, 121))
    assert len(room.steps(job)) <= 120 + 10


def test_pause_and_resume(room: Room) -> None:
    job = room.create("steps=20 wait=3")
    room.begin_runner()
    pid = pid_of(room.wait_for(job, is_running))
    room.wait_for(job, lambda job: bool(room.steps(job)))
    assert room.jobs.pause(job.id).status == "paused"
    room.wait(job, "paused")
    assert not is_alive(pid)
    assert set(room.steps(job)) <= {1, 2, 3}
    assert room.messages(job)[-1] == "The job is paused and will resume from its last checkpoint"
    assert room.jobs.resume(job.id).status == "queued"
    room.wait(job, "succeeded")
    assert set(room.steps(job)) == set(range(1, 21))


def test_a_job_resumed_before_it_has_stopped(room: Room) -> None:
    job = room.create("steps=20 wait=3")
    room.begin_runner()
    room.wait_for(job, is_running)
    room.jobs.pause(job.id)
    room.jobs.resume(job.id)
    room.wait(job, "succeeded")
    assert set(room.steps(job)) == set(range(1, 21))


def test_cancel_ends_even_a_stubborn_child(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CANCEL_GRACE_SECONDS", 0.1)
    job = room.create("steps=100 sleep=0.1 stubborn")
    room.begin_runner()
    pid = pid_of(room.wait_for(job, is_running))
    assert room.jobs.cancel(job.id).status == "cancelled"
    cancelled = room.wait(job, "cancelled")
    assert not is_alive(pid)
    assert (cancelled.error, cancelled.result_files) == (None, [])
    assert not room.models.served


def test_one_at_a_time_in_order(room: Room) -> None:
    first, second = room.create("steps=10 sleep=0.02"), room.create("steps=1")
    room.begin_runner()
    room.wait_for(first, is_running)
    assert room.jobs.get(second.id).status == "queued"
    done = [room.wait(job, "succeeded") for job in (first, second)]
    assert done[0].finished_at is not None
    assert done[1].finished_at is not None
    assert done[0].finished_at <= done[1].finished_at


def test_two_at_a_time(tmp_path: Path) -> None:
    room = Room(tmp_path, "--max-training-jobs", "2")
    jobs = [room.create("steps=100 sleep=0.05") for _ in range(3)]
    room.begin_runner()
    for job in jobs[:2]:
        room.wait_for(job, is_running)
    assert room.jobs.get(jobs[2].id).status == "queued"
    room.end_runner()
    assert {room.jobs.get(job.id).status for job in jobs} == {"queued"}


def test_jobs_continue_on_the_next_server(room: Room) -> None:
    job = room.create("steps=20 wait=3")
    room.begin_runner()
    pid = pid_of(room.wait_for(job, is_running))
    room.end_runner()
    assert not is_alive(pid)
    left = room.jobs.get(job.id)
    assert (left.status, left.child) == ("queued", None)
    room.begin_runner()
    room.wait(job, "succeeded")
    assert set(room.steps(job)) == set(range(1, 21))
    assert len(room.steps(job)) <= 21


def test_only_one_server_runs_jobs_and_the_other_takes_over(room: Room) -> None:
    first = room.begin_runner()
    second = room.begin_runner()
    job = room.create("steps=1")
    room.wait(job, "succeeded")
    holders = [each for each in (first, second) if each._lock is not None]
    assert len(holders) == 1
    room.runners.remove(holders[0])
    holders[0].begin_stop()
    holders[0].join()
    room.wait(room.create("steps=1"), "succeeded")


def test_the_state_of_a_killed_server_is_repaired(room: Room) -> None:
    """``kill -9`` between two transactions leaves such a state."""
    finished, running, cancelled = (room.create("steps=1") for _ in range(3))
    with room.database.write() as session:
        for job, status in ((finished, "running"), (running, "running"), (cancelled, "cancelled")):
            row = session.merge(job)
            row.status, row.child = status, ""  # type: ignore[assignment]
    for job in (finished, cancelled):
        run = room.home / "jobs" / job.id
        run.mkdir(parents=True)
        (run / "result.json").write_text(
            json.dumps({"status": "published", "metrics": {"trained_tokens": 7}})
        )
        folder = room.models.folder / folder_name(job.fine_tuned_model)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        room.models.provenance.mark(folder, job.fine_tuned_model, job.id)
    room.begin_runner()
    assert room.wait(finished, "succeeded").trained_tokens == 7
    assert room.wait(running, "succeeded").trained_tokens == 123
    assert room.wait(cancelled, "cancelled").finished_at is None
    assert room.models.served == {finished.fine_tuned_model, running.fine_tuned_model}
    assert len(list(room.models.folder.iterdir())) == 2


def test_a_job_for_another_base_waits(room: Room) -> None:
    other = room.jobs.add(room.jobs.draft(JobRequest("another", room.upload().id)))
    room.begin_runner()
    room.wait(room.create(), "succeeded")
    assert room.jobs.get(other.id).status == "queued"


def test_a_job_cancelled_at_the_last_moment_is_not_served(room: Room) -> None:
    job = room.create("steps=1")
    publish = room.models.publish

    def cancel_first(name: str, job: str) -> None:
        publish(name, job)
        room.jobs.cancel(job)

    room.models.publish = cancel_first  # type: ignore[method-assign]
    room.begin_runner()
    room.wait(job, "cancelled")
    assert not room.models.served
    assert list(room.models.folder.iterdir()) == []


@pytest.mark.parametrize("method", ["publish", "unpublish"])
def test_a_turn_that_fails_halfway_is_repeated(
    room: Room, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A full disk may cause this."""
    monkeypatch.setattr(runner, "FAILED_INTERVAL", 0.05)
    whole, failures = getattr(room.models, method), iter([OSError("full"), OSError("full")])

    def fail_twice(name: str, job: str) -> None:
        for error in failures:
            raise error
        whole(name, job)

    monkeypatch.setattr(room.models, method, fail_twice)
    job = room.create("steps=1", suffix="refused" if method == "unpublish" else "")
    room.begin_runner()
    room.wait(job, "failed" if method == "unpublish" else "succeeded")


def test_checkpoints_are_removed_with_the_end_of_the_job(room: Room) -> None:
    job = room.create("steps=2")
    room.begin_runner()
    room.wait(job, "succeeded")
    run = room.home / "jobs" / job.id
    wait_until(lambda: not (run / "checkpoints").exists(), 5)
    assert (run / "metrics.jsonl").exists()


NUL = {"target_modules": ["a\0b"]}
SURROGATE = {"target_modules": ["\ud800"]}
LONG = {"target_modules": ["x" * (1 << 21)]}


@pytest.mark.parametrize("recipe", [NUL, SURROGATE, LONG], ids=["NUL", "surrogate", "E2BIG"])
def test_arguments_that_no_process_accepts_fail_the_job(room: Room, recipe: dict[str, list[str]]) -> None:
    """Such values are already refused when the job is posted. This test covers the second check."""
    bad, good = room.create(recipe=recipe), room.create()
    room.begin_runner()
    failed = room.wait(bad, "failed")
    assert failed.error is not None
    assert failed.error["code"] == "not_started"
    assert failed.error["message"].startswith("The job could not start: ")
    room.wait(good, "succeeded")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "python"), MemoryError()])
def test_a_process_that_cannot_be_started_fails_the_job(
    room: Room, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole, failing = room._begin, iter([error])

    def fail_once(job: Job, folder: Path) -> Child:
        for each in failing:
            raise each
        return whole(job, folder)

    monkeypatch.setattr(room, "_begin", fail_once)
    bad, good = room.create(), room.create()
    room.begin_runner()
    assert room.wait(bad, "failed").finished_at is not None
    room.wait(good, "succeeded")


@pytest.mark.parametrize("damage", ["the folder", "metrics.jsonl", "result.json"])
def test_a_damaged_run_folder_fails_only_its_job(
    room: Room, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(runner, "FAILED_INTERVAL", 0.01)
    bad, good = room.create(), room.create()
    folder = room.home / "jobs" / bad.id
    folder.parent.mkdir()
    if damage == "the folder":
        folder.write_text("a file")
    else:
        (folder / damage).mkdir(parents=True)
    room.begin_runner()
    assert room.wait(bad, "failed").error
    room.wait(good, "succeeded")


@pytest.mark.parametrize(
    "column", [each.name for each in Job.__table__.columns if isinstance(each.type, JSON)]
)
def test_a_damaged_row_fails_only_its_job(room: Room, column: str) -> None:
    bad, good = room.create(), room.create()
    with sqlite3.connect(room.home / "state.sqlite3") as plain:
        plain.execute(f"UPDATE jobs SET {column} = '{{' WHERE id = ?", (bad.id,))
    plain.close()
    room.begin_runner()
    room.wait(good, "succeeded")
    error = room.wait(bad, "failed").error
    assert error is not None
    assert error["code"] == "job_damaged"
    assert column in error["message"]
    assert [job.id for job in room.jobs.list(None, 10).rows] == [good.id, bad.id]


def test_a_row_that_cannot_be_written_fails_only_its_job(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = room.create(), room.create()

    def fail(session: Session, job_id: str) -> Job:
        if job_id == bad.id:
            raise ZeroDivisionError
        return find_job(session, job_id)

    monkeypatch.setattr("server.finetune.jobs.runner.find_job", fail)
    room.begin_runner()
    room.wait(good, "succeeded")
    error = room.wait(bad, "failed").error
    assert error is not None
    assert error["code"] == "internal_error"


@pytest.mark.parametrize(("orders", "status", "files"), [("", "succeeded", 2), ("kept", "failed", 1)])
def test_the_evaluation_is_an_event_and_is_stored(room: Room, orders: str, status: str, files: int) -> None:
    job = room.create(orders, validation_file=room.upload().id)
    room.begin_runner()
    done = room.wait(job, "succeeded", "failed")
    assert (done.status, len(done.result_files)) == (status, files)
    assert json.loads(room.files.path(done.result_files[-1]).read_text()) == {"adapter": {"exact_match": 1.0}}
    events = room.jobs.events(job.id, None, 100).rows
    (told,) = [event for event in events if "exact_match" in event.data]
    assert (told.message, told.data) == ("It is better.", {"exact_match": 1.0, "base_exact_match": 0.0})


@pytest.mark.parametrize("known", [["2 rows are one."], []])
def test_a_warning_is_one_event(room: Room, known: list[str]) -> None:
    job = room.jobs.add(room.jobs.draft(JobRequest("base", room.upload("warn").id)), known)
    room.begin_runner()
    room.wait(job, "succeeded")
    events = room.jobs.events(job.id, None, 100).rows
    assert [event.level for event in events if event.message == "2 rows are one."] == ["warn"]
