"""The fine-tuning of a server. It is started after the engine and stopped before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from server.config import ServerConfig, TrainingConfig
from server.engine.interface import Service
from server.finetune.command.provenance import Provenance
from server.finetune.jobs.broadcaster import EventBroadcaster
from server.finetune.jobs.check import check
from server.finetune.jobs.command import train_command, train_environ
from server.finetune.jobs.database import Database, Job
from server.finetune.jobs.errors import StateUnusable
from server.finetune.jobs.files import Files
from server.finetune.jobs.metrics import TrainingCollector
from server.finetune.jobs.outcome import LOG
from server.finetune.jobs.process import Child
from server.finetune.jobs.published_models import PublishedModels
from server.finetune.jobs.runner import Runner, RunnerConfig
from server.finetune.jobs.store import JobRequest, Jobs
from server.finetune.jobs.validator import JobValidator
from server.pools import Pool

DATABASE = "state.sqlite3"

P = ParamSpec("P")
T = TypeVar("T")


class Training:
    """Files, jobs and the runner.

    Attributes:
        config: the limits.
        files, jobs: their methods block, so call them through ``read`` and ``write``.
        broadcaster: sends the events of jobs.
        disk, checks: threads that write uploads, and threads that wait for the check of an upload.
    """

    def __init__(self, config: ServerConfig, service: Service) -> None:
        """Blocks. Raises StateUnusable."""
        self.config: TrainingConfig = config.training
        self._server = config
        self._database = Database(_made(config.home) / DATABASE)
        self.files = Files(
            self._database,
            config.home / "files",
            partial(check, takes_reasoning=service.base.takes_reasoning),
        )
        self._models = PublishedModels(service, config.adapters.folder, Provenance(config.home))
        models = service.base.served_names or (service.base.name,)
        runner_config = RunnerConfig(config.home / "jobs", config.training.max_jobs, models, self._begin)
        self._runner = Runner(self._database, self.files, self._models, runner_config)
        self.jobs = Jobs(self._database, self._runner.wake)
        self.disk, self.checks = Pool("disk"), Pool("file-checks")
        self._readers, self._writers = Pool("database"), Pool("database-writes")
        self._validator, self._validator_threads = JobValidator(self.files, config), Pool("job-checks")
        self.broadcaster = EventBroadcaster(self.jobs, self._readers)

    def start(self) -> None:
        """Start to run jobs. Call it on the event loop of the service."""
        self._models.loop = asyncio.get_running_loop()
        self._runner.start()

    def begin_stop(self) -> None:
        """Begin to stop running jobs at a checkpoint. Returns at once. A second call does nothing."""
        self._runner.begin_stop()

    async def stop(self) -> None:
        """Wait until all jobs have stopped. The service must still run."""
        self.begin_stop()
        await self.disk.run(self._runner.join)
        self._validator.close()
        for pool in (self.disk, self.checks, self._validator_threads, self._readers, self._writers):
            pool.close()
        self._database.close()

    async def read(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of ``files`` or ``jobs`` that only reads."""
        return await self._readers.run(ask, *args, **kwargs)

    async def write(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of ``files`` or ``jobs`` that writes. It may wait for another server's transaction."""
        return await self._writers.run(ask, *args, **kwargs)

    async def create_job(self, request: JobRequest) -> Job:
        """Check the job and queue it. Raises InvalidRequest."""
        job = await self.read(self.jobs.draft, request)
        warnings = await self._validator_threads.run(self._validator.validate, job)
        return await self.write(self.jobs.add, job, warnings)

    def collector(self) -> TrainingCollector:
        """The collector of Prometheus metrics."""
        return TrainingCollector(lambda: self._runner.totals)

    async def is_made_by_job(self, model: str) -> bool:
        """Whether a fine-tuning job made the model of that name. Only then may clients replace it."""
        return not self._models.is_in_other_folder(model) and await self.disk.run(
            self._models.is_made_by_job, model
        )

    async def is_free(self, model: str) -> bool:
        """Whether there is no model and no folder of that name."""
        return not self._models.is_known(model) and not await self.disk.run(self._models.has_folder, model)

    async def delete_model(self, model: str) -> bool:
        """Stop serving the model and remove its folder. Returns False and does nothing if no job made it."""
        if not await self.is_made_by_job(model):
            return False
        await self._models.unload(model)
        return await self.disk.run(self._models.remove, model)

    def _begin(self, job: Job, folder: Path) -> Child:
        self._models.check_place(job.fine_tuned_model)
        command = train_command(job, folder, self.files, self._server)
        return Child(command, folder / LOG, train_environ(self.config), self.config.nice)


def _made(home: Path) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateUnusable(f"The state folder {home} cannot be created: {error.strerror}.") from error
    return home
