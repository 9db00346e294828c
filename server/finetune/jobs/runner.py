"""Makes child processes follow what the database says their jobs shall be. One thread; no torch.

Of the servers that share a state folder, one at a time runs jobs: the one that holds ``jobs/.lock``. It may
die at any moment. Whoever takes the lock next ends what it has left running, writes down what was finished,
and queues the rest again, which goes on from its last checkpoint.
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
from server.finetune.jobs.ending import Ending, ending_of
from server.finetune.jobs.errors import StorageFull
from server.finetune.jobs.files import Files
from server.finetune.jobs.metrics import Totals
from server.finetune.jobs.process import Child, kill_leftover
from server.finetune.jobs.store import count_jobs, find_job, give_up, is_told, tell

logger = logging.getLogger("manylora.jobs")

BUSY_INTERVAL = 0.25
"""Seconds between two looks at running jobs; also how old an event is at most when clients see it."""
IDLE_INTERVAL = 1.0
"""The same while nothing runs: how soon a job is seen that another server was asked for."""
FAILED_INTERVAL = 5.0
"""The same after a failure (a full disk, say)."""
PAUSE_PATIENCE = 60.0
"""Seconds that a job has to reach a checkpoint when it is paused."""
CANCEL_PATIENCE = 5.0
STOP_PATIENCE = 15.0
"""The same when the server ends."""
MOST_FAILURES = 3
"""At the third error of the system (a file that cannot be read, say) a running job has failed."""
MOST_DEATHS = 3
"""At the third death without a checkpoint in between a job has failed."""


class Models(Protocol):
    """Where finished adapters are served; both methods block."""

    def publish(self, name: str, job: str) -> None:
        """Serve what ``job`` has put into the folder of ``name``, from now on. Raises AdapterError."""

    def retract(self, name: str, job: str) -> None:
        """Serve it no longer, and remove its folder; nothing is done if ``job`` has not made it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the runner does its work.

    Attributes:
        folder: of the run folders, one a job.
        most: jobs that run at once.
        bases: names of the base that is served; jobs for others wait.
        begin: starts the process that trains a job in its run folder. Raises OSError.
    """

    folder: Path
    most: int
    bases: tuple[str, ...]
    begin: Callable[[Job, Path], Child]


class Runner:
    """Runs queued jobs from ``start`` until ``begin_stop``.

    Attributes:
        totals: of all jobs, as last seen.
    """

    def __init__(self, database: Database, files: Files, models: Models, plan: Plan) -> None:
        self._database = database
        self._files = files
        self._models = models
        self._plan = plan
        self._children: dict[str, Child] = {}
        self._failures: Counter[str] = Counter()
        self._lock: BinaryIO | None = None
        self.totals = Totals()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def wake(self) -> None:
        """Something has changed: look now."""
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
                self._turn()
            except Exception:
                logger.exception("looking after jobs failed; trying again")
                if self._stopping.is_set():
                    break  # the next server sets it right; the children end with this thread
                self._stopping.wait(FAILED_INTERVAL)
            self._wake.wait(BUSY_INTERVAL if self._children else IDLE_INTERVAL)
            self._wake.clear()
        if self._lock is not None:
            self._lock.close()

    def _turn(self) -> None:
        if self._may_run():
            self._look_after_jobs()
        with self._database.read() as session:
            self.totals = count_jobs(session)

    def _look_after_jobs(self) -> None:
        self._database.reserve.keep()
        self._set_right()
        for job_id, child in list(self._children.items()):
            with self._alone(job_id):
                self._follow(job_id, child)
        while len(self._children) < self._plan.most and not self._stopping.is_set() and self._start_next():
            pass

    def _may_run(self) -> bool:
        """Whether this server is the one."""
        if self._lock is None and self._plan.most > 0 and not self._stopping.is_set():
            self._lock = _try_lock(self._plan.folder / ".lock")
            if self._lock is not None:
                self._files.sweep()
        return self._lock is not None

    @contextmanager
    def _alone(self, job_id: str) -> Iterator[None]:
        """Whatever fails in the block ends this one job, with the reason; the others are looked after.

        What may pass is raised, to be tried again: a full or busy disk for ever, other errors of the system
        ``MOST_FAILURES`` times.
        """
        try:
            yield
        except (StorageFull, OperationalError, FutureTimeout):
            raise
        except Exception as error:
            self._failures[job_id] += 1
            if isinstance(error, OSError) and self._failures[job_id] < MOST_FAILURES:
                raise
            logger.exception("a job cannot go on", extra={"fields": {"job": job_id}})
            child = self._children.pop(job_id, None)
            if child is not None:
                child.kill()
            ending = Ending("failed", "internal_error", f"The job cannot go on: {_said(error)}")
            with self._database.write() as session:
                give_up(session, job_id, ending.error())

    def _set_right(self) -> None:
        """End what others have left: a server that died, or a turn of ours that failed halfway."""
        with self._database.read() as session:
            unended = session.execute(select(Job.id, Job.child).where(Job.child.is_not(None))).all()
        for job_id, child in unended:
            if child is not None and job_id not in self._children:
                with self._alone(job_id):
                    kill_leftover(child)
                    self._read_progress(job_id)
                    self._write_down(job_id, ending_of(self._folder(job_id), code=None), seconds=0.0)

    def _start_next(self) -> bool:
        """Begin the job that has waited longest; False if none waits."""
        waiting = select(Job.id).where(
            Job.status == "queued", Job.child.is_(None), Job.model.in_(self._plan.bases)
        )
        with self._database.read() as session:
            job_id = session.scalars(waiting.order_by(Job.seq).limit(1)).first()
        if job_id is None:
            return False
        with self._alone(job_id):
            self._start(job_id)
        return True

    def _start(self, job_id: str) -> None:
        with self._database.write() as session:
            job = find_job(session, job_id)
            if job.status != "queued":  # a client was quicker
                return
            tell(session, job, "Fine-tuning job goes on" if job.metrics_read else "Fine-tuning job started")
            job.status, job.child = "running", ""
        self._begin(job)

    def _begin(self, job: Job) -> None:
        folder = self._folder(job.id)
        try:
            folder.mkdir(exist_ok=True)
            (folder / progress.RESULT).unlink(missing_ok=True)  # of an attempt that was interrupted
            child = self._plan.begin(job, folder)
        except Exception as error:  # the disk, the processes, or a word that no process takes
            self._write_down(
                job.id, Ending("failed", "not_started", f"It could not start: {_said(error)}"), 0.0
            )
            return
        self._children[job.id] = child
        with self._database.write() as session:
            find_job(session, job.id).child = child.identity
        logger.info("job started", extra={"fields": {"job": job.id, "model": job.fine_tuned_model}})

    def _follow(self, job_id: str, child: Child) -> None:
        code = child.poll()  # before what it has written is read: so that nothing of it is missed
        job = self._read_progress(job_id)
        if code is not None:
            ending = ending_of(self._folder(job_id), None if child.told else code)
            self._write_down(job_id, ending, time.monotonic() - child.started)
            del self._children[job_id]
        elif self._stopping.is_set():
            child.stop(STOP_PATIENCE)
        elif job.status != "running":
            child.stop(CANCEL_PATIENCE if job.status == "cancelled" else PAUSE_PATIENCE)

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

    def _write_down(self, job_id: str, ending: Ending, seconds: float) -> None:
        """The child is gone: bring the model, the job and its files to what that means."""
        with self._database.read() as session:
            job = find_job(session, job_id)
        if job.status != "cancelled" and ending.outcome == "published":
            ending = self._publish(job, ending)
        results = self._keep_results(job, ending) if job.status != "cancelled" else []
        with self._database.write() as session:
            job = find_job(session, job_id)
            if job.status != "cancelled":
                _conclude(job, ending, results)
                tell(session, job, ending.told(job.status), "error" if job.status == "failed" else "info")
                _child_is_gone(job, seconds)
        if (
            job.status == "cancelled"
        ):  # perhaps only now: what was published is taken back, and then it is over
            self._retract(job)
            with self._database.write() as session:
                _child_is_gone(find_job(session, job_id), seconds)
        if job.status in ("succeeded", "cancelled"):
            self._tidy(job_id)
        fields = {"job": job_id, "status": job.status, "reason": ending.message}
        logger.info("job left off", extra={"fields": fields})

    def _publish(self, job: Job, ending: Ending) -> Ending:
        try:
            self._models.publish(job.fine_tuned_model, job.id)
        except ManyloraError as error:
            self._retract(job)
            return Ending("failed", "adapter_refused", f"The adapter cannot be served: {error}")
        return ending

    def _retract(self, job: Job) -> None:
        """Undo what the child may have published."""
        self._models.retract(job.fine_tuned_model, job.id)

    def _keep_results(self, job: Job, ending: Ending) -> list[str]:
        """OpenAI's result file, the metrics of every step as CSV; and how it did on the validation file."""
        results = []
        if ending.outcome == "published":
            with self._database.read() as session:
                wanted = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.kind == "metrics")
                events = session.scalars(wanted.order_by(JobEvent.seq)).all()
            results.append(self._files.add_results("step_metrics.csv", progress.as_csv(events)).id)
        if ending.evaluation is not None:
            text = json.dumps(ending.evaluation, indent=2)
            results.append(self._files.add_results("evaluation.json", text).id)
        return results

    def _tidy(self, job_id: str) -> None:
        """Nobody goes on from here: what is large can go."""
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(self._folder(job_id) / name, ignore_errors=True)

    def _folder(self, job_id: str) -> Path:
        return self._plan.folder / job_id


def _add(session: Session, job: Job, line: progress.Line) -> None:
    event = line.as_event(job.id)
    if line.event != "warning" or not is_told(session, job.id, event.message):  # when the job was made
        session.add(event)
    if line.event == "checkpoint":
        job.deaths = 0  # what was saved is not lost by dying
    if job.status == "running":
        job.estimated_finish = line.estimated_finish() or job.estimated_finish


def _said(error: Exception) -> str:
    """The error as a sentence that can be stored."""
    text = str(error) if isinstance(error, OSError | ManyloraError) else repr(error)
    return text.encode("ascii", "backslashreplace").decode()[:1000].rstrip(".") + "."


def _conclude(job: Job, ending: Ending, results: list[str]) -> None:
    job.deaths += ending.outcome == "died"
    job.result_files = results
    if ending.outcome == "published":
        job.status, job.error = "succeeded", None
        job.trained_tokens = ending.trained_tokens
    elif ending.outcome == "failed" or job.deaths >= MOST_DEATHS:
        job.status, job.error = "failed", ending.error()
    else:
        job.status = "queued" if job.status == "running" else job.status
        return
    job.finished_at = time.time()


def _child_is_gone(job: Job, seconds: float) -> None:
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
