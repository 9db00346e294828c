"""Completes a job whose training process has ended: its model, its row, its events and its files.

Each step can be repeated, because the server may die between two of them.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Protocol

from sqlalchemy import select

from adapters.errors import ManyloraError
from server.finetune.jobs import progress
from server.finetune.jobs.database import Database, Job, JobEvent, Level
from server.finetune.jobs.files import Files
from server.finetune.jobs.outcome import Outcome
from server.finetune.jobs.store import add_event, find_job

logger = logging.getLogger("manylora.jobs")

MAX_DEATHS = 3
"""A job fails when its process has been killed this often without a checkpoint in between."""


class ModelPublisher(Protocol):
    """Serves the adapters of finished jobs. Both methods block."""

    def publish(self, name: str, job: str) -> None:
        """Serve the adapter that ``job`` has put into the folder of ``name``. Raises AdapterError."""

    def unpublish(self, name: str, job: str) -> None:
        """Stop serving ``name`` and remove its folder. Does nothing if ``job`` did not make the folder."""


class Finisher:
    """Completes jobs, one at a time. Every method blocks.

    Args:
        folder: the folder of the run folders.
    """

    def __init__(self, database: Database, files: Files, models: ModelPublisher, folder: Path) -> None:
        self._database = database
        self._files = files
        self._models = models
        self._folder = folder

    def finish(self, job_id: str, outcome: Outcome, seconds: float) -> None:
        """Record how a process ended that ran for ``seconds``. Publish its adapter if it has made one."""
        with self._database.read() as session:
            job = find_job(session, job_id)
        results: list[str] = []
        if job.status != "cancelled":
            outcome = self._publish(job, outcome) if outcome.kind == "published" else outcome
            results = self._store_results(job, outcome)
        job = self._record(job_id, outcome, results, seconds)
        if job.status == "cancelled":  # possibly while its adapter was published
            self._models.unpublish(job.fine_tuned_model, job.id)
            with self._database.write() as session:
                _clear_child(find_job(session, job_id), seconds)
        if job.status in ("succeeded", "cancelled"):
            self._remove_large_files(job_id)
        fields = {"job": job_id, "status": job.status, "reason": outcome.message}
        logger.info("job process ended", extra={"fields": fields})

    def _record(self, job_id: str, outcome: Outcome, results: list[str], seconds: float) -> Job:
        """The job after the outcome is recorded. A cancelled job does not change."""
        with self._database.write() as session:
            job = find_job(session, job_id)
            if job.status != "cancelled":
                _apply_outcome(job, outcome, results)
                level: Level = "error" if job.status == "failed" else "info"
                add_event(session, job, outcome.event_message(job.status), level)
                _clear_child(job, seconds)
        return job

    def _publish(self, job: Job, outcome: Outcome) -> Outcome:
        try:
            self._models.publish(job.fine_tuned_model, job.id)
        except ManyloraError as error:
            self._models.unpublish(job.fine_tuned_model, job.id)
            return Outcome("failed", "adapter_refused", f"The adapter cannot be served: {error}")
        return outcome

    def _store_results(self, job: Job, outcome: Outcome) -> list[str]:
        """The ids of the result files: OpenAI's metrics of every step as CSV, and the evaluation."""
        results = []
        if outcome.kind == "published":
            with self._database.read() as session:
                wanted = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.kind == "metrics")
                events = session.scalars(wanted.order_by(JobEvent.seq)).all()
            results.append(self._files.add_results("step_metrics.csv", progress.as_csv(events)).id)
        if outcome.evaluation is not None:
            text = json.dumps(outcome.evaluation, indent=2)
            results.append(self._files.add_results("evaluation.json", text).id)
        return results

    def _remove_large_files(self, job_id: str) -> None:
        """The job cannot be resumed, so its checkpoints are not needed."""
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(self._folder / job_id / name, ignore_errors=True)


def _apply_outcome(job: Job, outcome: Outcome, results: list[str]) -> None:
    job.deaths += outcome.kind == "died"
    job.result_files = results
    if outcome.kind == "published":
        job.status, job.error = "succeeded", None
        job.trained_tokens = outcome.trained_tokens
    elif outcome.kind == "failed" or job.deaths >= MAX_DEATHS:
        job.status, job.error = "failed", outcome.error()
    else:
        job.status = "queued" if job.status == "running" else job.status
        return
    job.finished_at = time.time()


def _clear_child(job: Job, seconds: float) -> None:
    job.child = None
    job.seconds += seconds
    job.estimated_finish = None
