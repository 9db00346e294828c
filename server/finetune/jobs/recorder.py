"""Records the metrics of a training process as events of its job, each exactly once."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.orm import Session

from server.finetune.jobs import progress
from server.finetune.jobs.database import Database, Job
from server.finetune.jobs.store import find_job, has_event


def record_progress(database: Database, folder: Path, job_id: str) -> Job:
    """Add the lines in the run folder ``folder`` that are not events yet. Returns the job.

    Raises:
        JobNotKnown: there is no such job.
        OSError: the metrics cannot be read.
    """
    with database.read() as session:
        job = find_job(session, job_id)
    while True:
        lines, offset = progress.read_lines(folder, job.metrics_read)
        if offset == job.metrics_read:
            return job
        with database.write() as session:
            job = find_job(session, job_id)
            job.metrics_read = offset
            for line in lines:
                _record(session, job, line)


def _record(session: Session, job: Job, line: progress.MetricsLine) -> None:
    event = line.as_event(job.id)
    # The check of the job has recorded its warnings when the job was posted.
    if line.event != "warning" or not has_event(session, job.id, event.message):
        session.add(event)
    if line.event == "checkpoint":
        job.deaths = 0  # the job resumes from here, so earlier deaths do not count
    if job.status == "running":
        job.estimated_finish = line.estimated_finish() or job.estimated_finish
