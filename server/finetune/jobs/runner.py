"""Starts and stops the processes of jobs to match each job's status in the database. One thread; no torch.

Of the servers that share a state folder, one at a time runs jobs: the one that holds ``jobs/.lock``. It may
die at any moment. The next server that takes the lock kills its processes, records the finished jobs, and
queues the others again. Those resume from their last checkpoint.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from adapters.errors import ManyloraError
from server.finetune.jobs import progress
from server.finetune.jobs.database import Database, Job
from server.finetune.jobs.errors import StorageFull
from server.finetune.jobs.files import Files
from server.finetune.jobs.finisher import Finisher, ModelPublisher
from server.finetune.jobs.metrics import Totals
from server.finetune.jobs.outcome import Outcome, outcome_of
from server.finetune.jobs.process import Child, kill_orphan
from server.finetune.jobs.recorder import record_progress
from server.finetune.jobs.store import add_event, count_jobs, fail_job, find_job

logger = logging.getLogger("manylora.jobs")

BUSY_INTERVAL = 0.25
"""Seconds between two polls while jobs run. Clients see an event at most this late."""
IDLE_INTERVAL = 1.0
"""Seconds between two polls while no job runs. A job that another server has queued starts this late."""
FAILED_INTERVAL = 5.0
"""Seconds until the next poll after a poll has failed, for example on a full disk."""
PAUSE_GRACE_SECONDS = 60.0
"""Seconds that a paused job has to reach a checkpoint."""
CANCEL_GRACE_SECONDS = 5.0
"""Seconds that the process of a cancelled job has to end."""
STOP_GRACE_SECONDS = 15.0
"""Seconds that a job has to reach a checkpoint when the server stops."""
MAX_FAILURES = 3
"""A job fails at this many errors of the operating system, for example a file that cannot be read."""


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """The runner's settings.

    Attributes:
        folder: the folder of the run folders, one for each job.
        max_jobs: the largest number of jobs that run at once.
        base_names: the names of the served base. Jobs for other bases wait.
        start_process: starts the process that trains a job in its run folder. Raises OSError.
    """

    folder: Path
    max_jobs: int
    base_names: tuple[str, ...]
    start_process: Callable[[Job, Path], Child]


class Runner:
    """Runs queued jobs from ``start`` until ``begin_stop``.

    Attributes:
        totals: the totals of all jobs at the last poll.
    """

    def __init__(
        self, database: Database, files: Files, models: ModelPublisher, config: RunnerConfig
    ) -> None:
        self._database = database
        self._files = files
        self._config = config
        self._finisher = Finisher(database, files, models, config.folder)
        self._children: dict[str, Child] = {}
        self._failures: Counter[str] = Counter()
        self._lock: BinaryIO | None = None
        self.totals = Totals()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._config.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def wake(self) -> None:
        """Poll now. Do not wait for the next interval."""
        self._wake.set()

    def begin_stop(self) -> None:
        """Stop running jobs at a checkpoint and start no others. They are queued for the next server."""
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has stopped. Then no child process is left."""
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
                    break  # the children die with this thread, and the next server recovers their jobs
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
        """Whether this server holds the lock, so that it runs the jobs."""
        if self._lock is None and self._config.max_jobs > 0 and not self._stopping.is_set():
            self._lock = _try_lock(self._config.folder / ".lock")
            if self._lock is not None:
                self._files.sweep()
        return self._lock is not None

    @contextmanager
    def _isolated(self, job_id: str) -> Iterator[None]:
        """An error in the block ends this job and records the reason. The other jobs are not affected.

        Errors that may pass are raised, and the next poll tries again: a full or busy disk without a limit,
        other errors of the operating system ``MAX_FAILURES`` times.
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
            outcome = Outcome("failed", "internal_error", f"The job cannot continue: {_error_text(error)}")
            with self._database.write() as session:
                fail_job(session, job_id, outcome.error())

    def _recover(self) -> None:
        """Finish jobs whose process has no owner: a server has died, or a poll of ours has failed halfway."""
        with self._database.read() as session:
            unended = session.execute(select(Job.id, Job.child).where(Job.child.is_not(None))).all()
        for job_id, child in unended:
            if child is not None and job_id not in self._children:
                with self._isolated(job_id):
                    kill_orphan(child)
                    record_progress(self._database, self._folder(job_id), job_id)
                    self._finisher.finish(job_id, outcome_of(self._folder(job_id), code=None), seconds=0.0)

    def _start_next(self) -> bool:
        """Start the job that has waited longest. False if no job waits."""
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
            if job.status != "queued":  # a client has changed it in the meantime
                return
            if job.error is not None:  # its row is damaged, so its recipe may be lost
                fail_job(session, job_id, job.error)
                return
            resumes = job.metrics_read > 0
            add_event(session, job, "Fine-tuning job resumed" if resumes else "Fine-tuning job started")
            job.status, job.child = "running", ""
        self._start_child(job)

    def _start_child(self, job: Job) -> None:
        folder = self._folder(job.id)
        try:
            folder.mkdir(exist_ok=True)
            (folder / progress.RESULT).unlink(missing_ok=True)  # of an interrupted attempt
            child = self._config.start_process(job, folder)
        except Exception as error:  # of the disk, of the process, or of an argument that no process accepts
            outcome = Outcome("failed", "not_started", f"The job could not start: {_error_text(error)}")
            self._finisher.finish(job.id, outcome, seconds=0.0)
            return
        self._children[job.id] = child
        with self._database.write() as session:
            find_job(session, job.id).child = child.identity
        logger.info("job started", extra={"fields": {"job": job.id, "model": job.fine_tuned_model}})

    def _poll_child(self, job_id: str, child: Child) -> None:
        code = child.poll()  # before its metrics are read, so that none of them is missed
        job = record_progress(self._database, self._folder(job_id), job_id)
        if code is not None:
            outcome = outcome_of(self._folder(job_id), None if child.stop_requested else code)
            self._finisher.finish(job_id, outcome, time.monotonic() - child.started)
            del self._children[job_id]
        elif self._stopping.is_set():
            child.stop(STOP_GRACE_SECONDS)
        elif job.status != "running":
            child.stop(CANCEL_GRACE_SECONDS if job.status == "cancelled" else PAUSE_GRACE_SECONDS)

    def _folder(self, job_id: str) -> Path:
        return self._config.folder / job_id


def _error_text(error: Exception) -> str:
    """The error as a sentence that can be stored."""
    text = str(error) if isinstance(error, OSError | ManyloraError) else repr(error)
    return text.encode("ascii", "backslashreplace").decode()[:1000].rstrip(".") + "."


def _try_lock(path: Path) -> BinaryIO | None:
    """The lock file. The lock is held until the file is closed. None if another process holds it."""
    file = path.open("wb")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None
