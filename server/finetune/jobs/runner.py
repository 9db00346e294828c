"""Starts and stops the processes of jobs to match each job's status in the database. One thread; no torch.

Of the servers that share a state folder, one at a time runs jobs: the one that holds ``jobs/.lock``. It may
die at any moment. The next server that takes the lock kills its processes, records the finished jobs, and
queues the others again. Those resume from their last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from adapters.errors import ManyloraError
from server.finetune.jobs import progress
from server.finetune.jobs.database import Database, Job, JobEvent
from server.finetune.jobs.errors import StorageFull
from server.finetune.jobs.files import Files
from server.finetune.jobs.metrics import Totals
from server.finetune.jobs.outcome import Outcome, outcome_of
from server.finetune.jobs.process import Child, kill_orphan
from server.finetune.jobs.store import add_event, count_jobs, fail_job, find_job, has_event

logger = logging.getLogger("manylora.jobs")

BUSY_INTERVAL = 0.25
"""Seconds between two looks at running jobs; also how old an event is at most when clients see it."""
IDLE_INTERVAL = 1.0
"""The same while nothing runs: how soon a job is seen that another server was asked for."""
FAILED_INTERVAL = 5.0
"""The same after a failure (a full disk, say)."""
PAUSE_GRACE_SECONDS = 60.0
"""Seconds that a job has to reach a checkpoint when it is paused."""
CANCEL_GRACE_SECONDS = 5.0
STOP_GRACE_SECONDS = 15.0
"""The same when the server ends."""
MAX_FAILURES = 3
"""At the third error of the system (a file that cannot be read, say) a running job has failed."""
MAX_DEATHS = 3
"""At the third death without a checkpoint in between a job has failed."""


class ModelPublisher(Protocol):
    """Where finished adapters are served; both methods block."""

    def publish(self, name: str, job: str) -> None:
        """Serve what ``job`` has put into the folder of ``name``, from now on. Raises AdapterError."""

    def unpublish(self, name: str, job: str) -> None:
        """Serve it no longer, and remove its folder; nothing is done if ``job`` has not made it."""


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """The runner's settings.

    Attributes:
        folder: of the run folders, one a job.
        max_jobs: most jobs that run at once.
        base_names: names of the base that is served; jobs for others wait.
        start_process: starts the process that trains a job in its run folder. Raises OSError.
    """

    folder: Path
    max_jobs: int
    base_names: tuple[str, ...]
    start_process: Callable[[Job, Path], Child]


class Runner:
    """Runs queued jobs from ``start`` until ``begin_stop``.

    Attributes:
        totals: of all jobs, as last seen.
    """

    def __init__(
        self, database: Database, files: Files, models: ModelPublisher, config: RunnerConfig
    ) -> None:
        self._database = database
        self._files = files
        self._models = models
        self._config = config
        self._children: dict[str, Child] = {}
        self._failures: Counter[str] = Counter()
        self._lock: BinaryIO | None = None
        self.totals = Totals()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._config.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at the jobs now instead of at the next interval."""
        self._wake.set()

    def begin_stop(self) -> None:
        """Bring running jobs to a checkpoint and start no more; they are queued for the next server."""
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Wait for that; no child is left afterwards."""
        if self._thread.is_alive():
            self._thread.join()

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set() or self._children:
            try:
                self._poll()
            except Exception:
                logger.exception("job runner failed; trying again")
                if self._stopping.is_set():
                    break  # the next server sets it right; the children end with this thread
                self._stopping.wait(FAILED_INTERVAL)
            self._wake.wait(BUSY_INTERVAL if self._children else IDLE_INTERVAL)
            self._wake.clear()
        if self._lock is not None:
            self._lock.close()

    def _poll(self) -> None:
        if self._acquire_lock():
            self._run_jobs()
        with self._database.read() as session:
            self.totals = count_jobs(session)

    def _run_jobs(self) -> None:
        self._database.reserve.ensure()
        self._recover()
        for job_id, child in list(self._children.items()):
            with self._isolated(job_id):
                self._poll_child(job_id, child)
        while (
            len(self._children) < self._config.max_jobs and not self._stopping.is_set() and self._start_next()
        ):
            pass

    def _acquire_lock(self) -> bool:
        """Whether this server runs the jobs: it holds the lock."""
        if self._lock is None and self._config.max_jobs > 0 and not self._stopping.is_set():
            self._lock = _try_lock(self._config.folder / ".lock")
            if self._lock is not None:
                self._files.sweep()
        return self._lock is not None

    @contextmanager
    def _isolated(self, job_id: str) -> Iterator[None]:
        """Whatever fails in the block ends this one job, with the reason; the others are looked after.

        What may pass is raised, to be tried again: a full or busy disk for ever, other errors of the system
        ``MAX_FAILURES`` times.
        """
        try:
            yield
        except (StorageFull, OperationalError, FutureTimeout):
            raise
        except Exception as error:
            self._failures[job_id] += 1
            if isinstance(error, OSError) and self._failures[job_id] < MAX_FAILURES:
                raise
            logger.exception("job failed with an internal error", extra={"fields": {"job": job_id}})
            child = self._children.pop(job_id, None)
            if child is not None:
                child.kill()
            outcome = Outcome("failed", "internal_error", f"The job cannot go on: {_error_text(error)}")
            with self._database.write() as session:
                fail_job(session, job_id, outcome.error())

    def _recover(self) -> None:
        """End what others have left: a server that died, or a turn of ours that failed halfway."""
        with self._database.read() as session:
            unended = session.execute(select(Job.id, Job.child).where(Job.child.is_not(None))).all()
        for job_id, child in unended:
            if child is not None and job_id not in self._children:
                with self._isolated(job_id):
                    kill_orphan(child)
                    self._read_progress(job_id)
                    self._finish(job_id, outcome_of(self._folder(job_id), code=None), seconds=0.0)

    def _start_next(self) -> bool:
        """Begin the job that has waited longest; False if none waits."""
        waiting = select(Job.id).where(
            Job.status == "queued", Job.child.is_(None), Job.model.in_(self._config.base_names)
        )
        with self._database.read() as session:
            job_id = session.scalars(waiting.order_by(Job.seq).limit(1)).first()
        if job_id is None:
            return False
        with self._isolated(job_id):
            self._start(job_id)
        return True

    def _start(self, job_id: str) -> None:
        with self._database.write() as session:
            job = find_job(session, job_id)
            if job.status != "queued":  # a client was quicker
                return
            if job.error is not None:  # its row is damaged, so its recipe may be lost
                fail_job(session, job_id, job.error)
                return
            add_event(
                session, job, "Fine-tuning job goes on" if job.metrics_read else "Fine-tuning job started"
            )
            job.status, job.child = "running", ""
        self._begin(job)

    def _begin(self, job: Job) -> None:
        folder = self._folder(job.id)
        try:
            folder.mkdir(exist_ok=True)
            (folder / progress.RESULT).unlink(missing_ok=True)  # of an attempt that was interrupted
            child = self._config.start_process(job, folder)
        except Exception as error:  # the disk, the processes, or a word that no process takes
            self._finish(
                job.id, Outcome("failed", "not_started", f"It could not start: {_error_text(error)}"), 0.0
            )
            return
        self._children[job.id] = child
        with self._database.write() as session:
            find_job(session, job.id).child = child.identity
        logger.info("job started", extra={"fields": {"job": job.id, "model": job.fine_tuned_model}})

    def _poll_child(self, job_id: str, child: Child) -> None:
        code = child.poll()  # before what it has written is read: so that nothing of it is missed
        job = self._read_progress(job_id)
        if code is not None:
            outcome = outcome_of(self._folder(job_id), None if child.stop_requested else code)
            self._finish(job_id, outcome, time.monotonic() - child.started)
            del self._children[job_id]
        elif self._stopping.is_set():
            child.stop(STOP_GRACE_SECONDS)
        elif job.status != "running":
            child.stop(CANCEL_GRACE_SECONDS if job.status == "cancelled" else PAUSE_GRACE_SECONDS)

    def _read_progress(self, job_id: str) -> Job:
        """Turn what the child has written since the last look into events, each exactly once."""
        with self._database.read() as session:
            job = find_job(session, job_id)
        while True:
            lines, offset = progress.read_lines(self._folder(job_id), job.metrics_read)
            if offset == job.metrics_read:
                return job
            with self._database.write() as session:
                job = find_job(session, job_id)
                job.metrics_read = offset
                for line in lines:
                    _add(session, job, line)

    def _finish(self, job_id: str, outcome: Outcome, seconds: float) -> None:
        """The child is gone: bring the model, the job and its files to what that means."""
        with self._database.read() as session:
            job = find_job(session, job_id)
        if job.status != "cancelled" and outcome.kind == "published":
            outcome = self._publish(job, outcome)
        results = self._store_results(job, outcome) if job.status != "cancelled" else []
        with self._database.write() as session:
            job = find_job(session, job_id)
            if job.status != "cancelled":
                _apply_outcome(job, outcome, results)
                add_event(
                    session,
                    job,
                    outcome.event_message(job.status),
                    "error" if job.status == "failed" else "info",
                )
                _clear_child(job, seconds)
        if (
            job.status == "cancelled"
        ):  # perhaps only now: what was published is taken back, and then it is over
            self._unpublish(job)
            with self._database.write() as session:
                _clear_child(find_job(session, job_id), seconds)
        if job.status in ("succeeded", "cancelled"):
            self._remove_large_files(job_id)
        fields = {"job": job_id, "status": job.status, "reason": outcome.message}
        logger.info("job process ended", extra={"fields": fields})

    def _publish(self, job: Job, outcome: Outcome) -> Outcome:
        try:
            self._models.publish(job.fine_tuned_model, job.id)
        except ManyloraError as error:
            self._unpublish(job)
            return Outcome("failed", "adapter_refused", f"The adapter cannot be served: {error}")
        return outcome

    def _unpublish(self, job: Job) -> None:
        """Undo what the child may have published."""
        self._models.unpublish(job.fine_tuned_model, job.id)

    def _store_results(self, job: Job, outcome: Outcome) -> list[str]:
        """OpenAI's result file, the metrics of every step as CSV; and how it did on the validation file."""
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
        """Nobody goes on from here: what is large can go."""
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(self._folder(job_id) / name, ignore_errors=True)

    def _folder(self, job_id: str) -> Path:
        return self._config.folder / job_id


def _add(session: Session, job: Job, line: progress.MetricsLine) -> None:
    event = line.as_event(job.id)
    if line.event != "warning" or not has_event(session, job.id, event.message):  # when the job was made
        session.add(event)
    if line.event == "checkpoint":
        job.deaths = 0  # what was saved is not lost by dying
    if job.status == "running":
        job.estimated_finish = line.estimated_finish() or job.estimated_finish


def _error_text(error: Exception) -> str:
    """The error as a sentence that can be stored."""
    text = str(error) if isinstance(error, OSError | ManyloraError) else repr(error)
    return text.encode("ascii", "backslashreplace").decode()[:1000].rstrip(".") + "."


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


def _try_lock(path: Path) -> BinaryIO | None:
    """The lock file, held until it is closed; None if another process holds it."""
    file = path.open("wb")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None
