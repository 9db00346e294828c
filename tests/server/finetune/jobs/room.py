"""Fine-tuning without a server: a database, files without checks, and a runner of fake training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import AdapterInvalid
from adapters.paths import folder_name
from server.config import ServerConfig, from_args
from server.finetune.command.provenance import Provenance
from server.finetune.jobs.check import Checked
from server.finetune.jobs.command import train_command, train_environ
from server.finetune.jobs.database import Database, Job, StoredFile
from server.finetune.jobs.files import TRAINING, Files
from server.finetune.jobs.process import Child
from server.finetune.jobs.runner import Runner, RunnerConfig
from server.finetune.jobs.store import JobRequest, Jobs


@dataclass
class FakeModels:
    """Fake served models: a set of names. It refuses names that contain ``refused``."""

    folder: Path
    provenance: Provenance
    served: set[str] = field(default_factory=set)

    def publish(self, name: str, job: str) -> None:
        if "refused" in name:
            raise AdapterInvalid("Its tensors are all zero.")
        assert self.provenance.job_of(self.folder / folder_name(name), name) == job
        self.served.add(name)

    def unpublish(self, name: str, job: str) -> None:
        folder = self.folder / folder_name(name)
        if self.provenance.job_of(folder, name) == job:
            self.served.discard(name)
            shutil.rmtree(folder)


class Room:
    """A state folder with everything for fine-tuning. ``begin_runner`` may be called several times."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.home = home
        self.config: ServerConfig = from_args(["--home", str(home), *flags], {})
        self.database = Database(home / "state.sqlite3")
        self.files = Files(self.database, home / "files", check=lambda *_: Checked("chat", 1))
        self.models = FakeModels(self.config.adapters.folder, Provenance(home))
        self.runners: list[Runner] = []
        self.jobs = Jobs(self.database, self._wake)

    def upload(self, orders: str = "", filename: str = "train.jsonl") -> StoredFile:
        """A training file with orders for ``fake_train.py``."""
        messages = [{"role": "user", "content": orders}, {"role": "assistant", "content": "yes"}]
        upload = self.files.begin()
        upload.write(json.dumps({"messages": messages}).encode() + b"\n")
        return self.files.keep(upload, filename, TRAINING)

    def create(self, orders: str = "", **fields: object) -> Job:
        return self.jobs.add(self.jobs.draft(JobRequest("base", self.upload(orders).id, **fields)))  # type: ignore[arg-type]

    def begin_runner(self) -> Runner:
        config = RunnerConfig(self.home / "jobs", self.config.training.max_jobs, ("base",), self._begin)
        runner = Runner(self.database, self.files, self.models, config)
        self.runners.append(runner)
        runner.start()
        return runner

    def end_runner(self) -> None:
        runner = self.runners.pop()
        runner.begin_stop()
        runner.join()

    def wait(self, job: Job, *statuses: str, seconds: float = 20) -> Job:
        """Wait until the job has one of the statuses and no child. Returns the job."""
        return self.wait_for(job, lambda now: now.status in statuses and now.child is None, seconds)

    def wait_for(self, job: Job, condition: Callable[[Job], bool], seconds: float = 20) -> Job:
        deadline = time.monotonic() + seconds
        while not condition(now := self.jobs.get(job.id)):
            assert time.monotonic() < deadline, f"it did not happen in time: {now}"
            time.sleep(0.02)
        return now

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.jobs.events(job.id, None, 1000, ascending=True).rows]

    def steps(self, job: Job) -> list[int]:
        events = self.jobs.events(job.id, None, 1000, ascending=True).rows
        return [
            event.data["step"] for event in events if event.kind == "metrics" and "train_loss" in event.data
        ]

    def _begin(self, job: Job, folder: Path) -> Child:
        return Child(
            train_command(job, folder, self.files, self.config),
            folder / "train.log",
            train_environ(self.config.training),
            nice=0,
        )

    def _wake(self) -> None:
        for each in self.runners:
            each.wake()
