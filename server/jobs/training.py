"""All of a server's fine-tuning: opened with its config, started after its engine, stopped before it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from adapters.errors import AdapterNotFound
from adapters.paths import folder_name
from server.config import ServerConfig, TrainingConfig
from server.engine.request import Service
from server.jobs.check import check
from server.jobs.command import train_command, train_environ
from server.jobs.database import Database, Job
from server.jobs.ending import LOG
from server.jobs.errors import StateUnusable
from server.jobs.feed import Feed
from server.jobs.files import Files
from server.jobs.metrics import TrainingCollector
from server.jobs.process import Child
from server.jobs.runner import Plan, Runner
from server.jobs.store import Jobs, Wanted
from server.jobs.vetting import vet
from server.pools import Pool

DATABASE = "state.sqlite3"
_LOAD_SECONDS = 60.0

P = ParamSpec("P")
T = TypeVar("T")


class Training:
    """Files, jobs and who runs them.

    Attributes:
        config: the limits.
        files, jobs: what clients ask of; their methods block, so await them through ``read`` and ``write``.
        feed: the events of jobs as they come.
        disk, checks: the threads that write uploads, and that wait for the check of one.
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
        self._served = _Served(service, config.adapters.folder)
        models = service.base.served_names or (service.base.name,)
        plan = Plan(config.home / "jobs", config.training.max_jobs, models, self._begin)
        self._runner = Runner(self._database, self.files, self._served, plan)
        self.jobs = Jobs(self._database, self._runner.wake)
        self.disk, self.checks = Pool("disk"), Pool("file-checks")
        self._readers, self._writers = Pool("database"), Pool("database-writes")
        self._vetting = Pool("job-checks")
        self.feed = Feed(self.jobs, self._readers)

    def start(self) -> None:
        """Run jobs from now on. Call it on the event loop of the service."""
        self._served.loop = asyncio.get_running_loop()
        self._runner.start()

    def begin_stop(self) -> None:
        """Bring running jobs to a checkpoint; harmless a second time. Returns at once."""
        self._runner.begin_stop()

    async def stop(self) -> None:
        """Wait for that. The service must still run."""
        self.begin_stop()
        await self.disk.run(self._runner.join)
        for pool in (self.disk, self.checks, self._vetting, self._readers, self._writers):
            pool.close()
        self._database.close()

    async def read(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a method of ``files`` or ``jobs`` that only looks."""
        return await self._readers.run(ask, *args, **kwargs)

    async def write(self, ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of one that changes something; it may wait long for another server's transaction."""
        return await self._writers.run(ask, *args, **kwargs)

    async def create_job(self, wanted: Wanted) -> Job:
        """Queue a job that can be trained and served, as far as can be known. Raises InvalidRequest."""
        job = await self.read(self.jobs.draft, wanted)
        warnings = await self._vetting.run(vet, job, self.files, self._server)
        return await self.write(self.jobs.add, job, warnings)

    def collector(self) -> TrainingCollector:
        """What Prometheus is told."""
        return TrainingCollector(lambda: self._runner.totals)

    def has_folder(self, model: str) -> bool:
        """Whether something is in the adapter folder under that name. Blocks."""
        return self._served.folder_of(model).exists()

    async def delete_model(self, model: str) -> None:
        """Serve it no longer and remove it from the disk."""
        await self._served.unload(model)
        await self.disk.run(self._served.remove, model)

    def _begin(self, job: Job, folder: Path) -> Child:
        command = train_command(job, folder, self.files, self._server)
        return Child(command, folder / LOG, train_environ(self.config), self.config.nice)


class _Served:
    """``runner.Models``, carried from the runner's thread to the event loop of the service."""

    def __init__(self, service: Service, root: Path) -> None:
        self._service = service
        self._root = root
        self.loop: asyncio.AbstractEventLoop | None = None

    def folder_of(self, name: str) -> Path:
        return self._root / folder_name(name)

    def publish(self, name: str) -> None:
        self._on_loop(self._service.load_adapter(name, folder_name(name), True))

    def retract(self, name: str) -> None:
        self._on_loop(self.unload(name))
        self.remove(name)

    async def unload(self, name: str) -> None:
        with suppress(AdapterNotFound):
            await self._service.unload_adapter(name)

    def remove(self, name: str) -> None:
        """Renamed first, to what is never looked at: no half of it is ever seen."""
        folder = self.folder_of(name)
        gone = folder.with_name(f".deleted-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _on_loop(self, work: Coroutine[Any, Any, object]) -> None:
        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.loop).result(_LOAD_SECONDS)


def _made(home: Path) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateUnusable(f"The state folder {home} cannot be made: {error.strerror}.") from error
    return home
