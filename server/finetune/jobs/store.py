"""The jobs of one state folder, in the database.

This module records the status that a job should have. ``runner.py`` starts and stops its process.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, case, func, or_, select, update
from sqlalchemy.orm import Session

from adapters.errors import AdapterNameInvalid
from adapters.paths import check_name
from server.errors import InvalidRequest
from server.finetune.jobs.database import UNFINISHED, Database, Job, JobEvent, Level, Status
from server.finetune.jobs.errors import JobConflict, JobNotKnown
from server.finetune.jobs.files import training_file
from server.finetune.jobs.metrics import Totals
from server.finetune.jobs.paging import Page, page_of

_ID_CHARACTERS = string.ascii_lowercase + string.digits
_MAX_NEW_EVENTS = 1000


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A client's request for a job.

    Attributes:
        model: the name of the base.
        name: the name of the adapter; None = ``ft:model:suffix:id``.
        suffix: "" = none.
        seed: None = a random one.
        hyperparameters, recipe, tags: as in ``Job``.
    """

    model: str
    training_file: str
    validation_file: str | None = None
    name: str | None = None
    suffix: str = ""
    seed: int | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewEvents:
    """New events of all jobs, from one consistent view of the database.

    Attributes:
        events: the oldest first.
        position: where the next call continues.
        more: whether further events exist already.
        live: ids of the jobs that may still get events.
    """

    events: list[JobEvent]
    position: int
    more: bool
    live: frozenset[str]


class Jobs:
    """All jobs of one state folder. Every method blocks."""

    def __init__(self, database: Database, on_change: Callable[[], None]) -> None:
        """``on_change`` is called after a job was added or changed. It returns at once."""
        self._database = database
        self._on_change = on_change

    def draft(self, request: JobRequest) -> Job:
        """A job that is not queued yet. Raises InvalidRequest naming the field."""
        with self._database.read() as session:
            _find_files(session, request.training_file, request.validation_file)
        return Job(
            id=f"ftjob-{secrets.token_hex(12)}",
            created_at=time.time(),
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            fine_tuned_model=_model_name(request),
            seed=secrets.randbits(31) if request.seed is None else request.seed,
            hyperparameters=request.hyperparameters,
            recipe=request.recipe,
            tags=request.tags,
        )

    def add(self, job: Job, warnings: Sequence[str] = ()) -> Job:
        """Queue a draft. Raises InvalidRequest if a file was deleted in the meantime."""
        with self._database.write() as session:
            _find_files(session, job.training_file, job.validation_file)
            session.add(job)
            session.flush()
            add_event(session, job, f"Created fine-tuning job: {job.id}")
            for warning in warnings:
                add_event(session, job, warning, "warn")
        self._on_change()
        return job

    def get(self, job_id: str) -> Job:
        """Raises JobNotKnown."""
        with self._database.read() as session:
            return find_job(session, job_id)

    def list(self, after: str | None, limit: int, tags: dict[str, str] | None = None) -> Page[Job]:
        """The jobs that have all ``tags``, the newest first. Raises InvalidRequest for ``after``."""
        wanted = select(Job)
        for key, value in (tags or {}).items():
            # SQLite refuses the whole query if it meets damaged JSON.
            tag = case((func.json_valid(Job.tags) == 1, Job.tags[key].as_string()), else_=None)
            wanted = wanted.where(tag == value)
        with self._database.read() as session:
            return page_of(session, wanted, Job, after, limit, ascending=False)

    def events(self, job_id: str, after: str | None, limit: int, ascending: bool = False) -> Page[JobEvent]:
        """The newest first, unless ``ascending``. Raises JobNotKnown, or InvalidRequest for ``after``."""
        wanted = select(JobEvent).where(JobEvent.job_id == job_id)
        return self._events(wanted, job_id, after, limit, ascending)

    def checkpoints(self, job_id: str, after: str | None, limit: int) -> Page[JobEvent]:
        """The events of checkpoints, the newest first. Raises as ``events``."""
        wanted = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.kind == "checkpoint")
        return self._events(wanted, job_id, after, limit, ascending=False)

    def new_events(self, position: int | None) -> NewEvents:
        """The events after ``position``. None = no events, only the position of the next one."""
        with self._database.read() as session:
            if position is None:
                return NewEvents(
                    [], session.scalar(select(func.max(JobEvent.seq))) or 0, False, _live(session)
                )
            wanted = select(JobEvent).where(JobEvent.seq > position).order_by(JobEvent.seq)
            events = list(session.scalars(wanted.limit(_MAX_NEW_EVENTS)))
            newest = events[-1].seq if events else position
            return NewEvents(events, newest, len(events) == _MAX_NEW_EVENTS, _live(session))

    def cancel(self, job_id: str) -> Job:
        """End the job. Its model is not served. Raises JobNotKnown, or JobConflict if the job has ended."""
        return self._move(job_id, "cancelled", UNFINISHED, "Fine-tuning job cancelled")

    def pause(self, job_id: str) -> Job:
        """Stop the job at a checkpoint. Raises JobNotKnown, or JobConflict if the job has ended."""
        return self._move(job_id, "paused", ("queued", "running"), "Fine-tuning job paused")

    def resume(self, job_id: str) -> Job:
        """Queue a paused job again. Raises JobNotKnown, or JobConflict if the job is not paused."""
        return self._move(job_id, "queued", ("paused",), "Fine-tuning job queued again")

    def _events(
        self, wanted: Select[JobEvent], job_id: str, after: str | None, limit: int, ascending: bool
    ) -> Page[JobEvent]:
        with self._database.read() as session:
            find_job(session, job_id)
            return page_of(session, wanted, JobEvent, after, limit, ascending)

    def _move(self, job_id: str, to: Status, allowed: tuple[Status, ...], message: str) -> Job:
        def change(session: Session) -> Job:
            job = find_job(session, job_id)
            if job.status == to:
                return job
            if job.status not in allowed:
                only = " or ".join(allowed)
                raise JobConflict(f"Job {job_id} is {job.status}; only a job that is {only} can be {to}.")
            job.status = to
            job.estimated_finish = None
            if to == "cancelled":
                job.finished_at = time.time()
            add_event(session, job, message)
            return job

        # A cancelled job's files can be deleted, so a cancellation must succeed on a full disk.
        job = self._database.write_with_reserve(change)
        self._on_change()
        return job


def _find_files(session: Session, training: str, validation: str | None) -> None:
    training_file(session, training, "training_file")
    if validation is not None:
        training_file(session, validation, "validation_file")


def has_event(session: Session, job_id: str, message: str) -> bool:
    """Whether the job has an event with this message."""
    same = select(JobEvent.seq).where(JobEvent.job_id == job_id, JobEvent.message == message)
    return session.scalars(same.limit(1)).first() is not None


def find_job(session: Session, job_id: str) -> Job:
    """Raises JobNotKnown."""
    job = session.scalars(select(Job).where(Job.id == job_id)).one_or_none()
    if job is None:
        raise JobNotKnown(f"There is no job {job_id!r:.100}; GET /v1/fine_tuning/jobs lists them.")
    return job


def fail_job(session: Session, job_id: str, error: dict[str, Any]) -> None:
    """End a job with ``error``. It does not load the row, which may be the cause of the failure."""
    ended = {"status": "failed", "error": error, "finished_at": time.time()}
    session.execute(update(Job).where(Job.id == job_id, Job.status.in_(UNFINISHED)).values(ended))
    session.execute(update(Job).where(Job.id == job_id).values(child=None, estimated_finish=None))
    add_event_by_id(session, job_id, f"Fine-tuning job failed: {error['message']}", "error")


def is_over(job: Job) -> bool:
    """Whether the job has ended and its process too, so that it gets no further events."""
    return job.status not in UNFINISHED and job.child is None


def _live(session: Session) -> frozenset[str]:
    """The ids of all jobs that are not over."""
    wanted = select(Job.id).where(or_(Job.status.in_(UNFINISHED), Job.child.is_not(None)))
    return frozenset(session.scalars(wanted))


def count_jobs(session: Session) -> Totals:
    """The totals of all jobs."""
    rows = session.execute(select(Job.status, func.count(), func.sum(Job.seconds)).group_by(Job.status)).all()
    jobs = {status: count for status, count, _ in rows}
    return Totals(jobs, sum(seconds for _, _, seconds in rows))


def add_event(session: Session, job: Job, message: str, level: Level = "info") -> None:
    """Add an event to the job."""
    add_event_by_id(session, job.id, message, level)


def add_event_by_id(session: Session, job_id: str, message: str, level: Level) -> None:
    """Add an event to a job without loading the job's row."""
    session.add(JobEvent(job_id=job_id, created_at=time.time(), level=level, kind="message", message=message))


def check_job_name(name: str) -> str:
    """Returns ``name`` if a job may give it to its model. Raises InvalidRequest."""
    if name.startswith("ft:"):
        raise InvalidRequest(
            f"{name!r:.140} begins with 'ft:', like the names of jobs without a 'name'; choose another name.",
            "name",
        )
    return _checked(name, "name")


def _model_name(request: JobRequest) -> str:
    """The name of the job's model. Raises InvalidRequest if it cannot be the name of a folder."""
    if request.name is not None:
        return check_job_name(request.name)
    unique = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))
    return _checked(f"ft:{request.model}:{request.suffix}:{unique}", "suffix")


def _checked(name: str, field_name: str) -> str:
    try:
        return check_name(name)
    except AdapterNameInvalid as error:
        raise InvalidRequest(str(error), field_name, "invalid_value") from None
