"""Repeated ``kill -9`` of a whole server. No job is lost or runs unnoticed, and no model is incomplete."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from adapters.paths import served_name
from tests.support.project import ROOT
from tests.support.running_server import free_port
from tests.support.training_server import rows
from tests.support.waiting import wait_until

MOMENTS = (0.0, 0.03, 0.07, 0.12, 0.18, 0.25, 0.33, 0.42, 0.05, 0.15)
"""The seconds between the server's first answer and its kill."""
JOBS, STEPS = 3, 40


class Doomed:
    """A server process on one state folder, and its client."""

    def __init__(self, home: Path) -> None:
        port = str(free_port())
        command = [
            sys.executable,
            "-m",
            "tests.server.finetune.jobs.doomed_server",
            "--home",
            str(home),
            "--port",
            port,
        ]
        self.log = (home.parent / "serve.log").open("ab")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1")
        wait_until(self._answers, 20)

    def jobs(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self.http.get("fine_tuning/jobs").raise_for_status().json()["data"]
        return data

    def create(self) -> str:
        files = {"file": ("train.jsonl", rows(f"steps={STEPS} sleep=0.02"))}
        file = (
            self.http.post("files", files=files, data={"purpose": "fine-tune"})
            .raise_for_status()
            .json()["id"]
        )
        body = {"model": "tiny", "training_file": file}
        job: str = self.http.post("fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        return job

    def steps(self, job: str) -> list[int]:
        events = self.http.get(f"fine_tuning/jobs/{job}/events", params={"limit": 100, "stream": "true"})
        lines = [
            line.removeprefix("data: ") for line in events.text.splitlines() if line.startswith("data: {")
        ]
        return [event["data"]["step"] for event in map(json.loads, lines) if "train_loss" in event["data"]]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self._close()

    def end(self) -> None:
        self.process.terminate()
        self._close()

    def _close(self) -> None:
        self.process.wait(20)
        self.http.close()
        self.log.close()

    def _answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.http.get("models").status_code == 200
        except httpx.TransportError:
            return False


def training_processes(home: Path) -> list[int]:
    """The processes that use this state folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"tests.support.fake_train" in words and str(home).encode() in words:
            found.append(int(folder.name))
    return found


def test_kill_the_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    server = Doomed(home)
    ids = [server.create() for _ in range(JOBS)]
    for moment in MOMENTS:
        time.sleep(moment)
        server.kill()
        wait_until(lambda: not training_processes(home), 5)
        assert_only_whole_models(home)
        server = Doomed(home)
        states = {job["id"]: job["status"] for job in server.jobs()}
        assert list(states) == ids[::-1]
        assert set(states.values()) <= {"queued", "running", "succeeded"}
        assert len(training_processes(home)) <= 1
    wait_until(lambda: {job["status"] for job in server.jobs()} == {"succeeded"}, 30)
    assert_only_whole_models(home)
    for job in server.jobs():
        assert set(server.steps(job["id"])) == set(range(1, STEPS + 1))
    models = {served_name(folder.name) for folder in (home / "adapters").iterdir()}
    assert models == {job["fine_tuned_model"] for job in server.jobs()}
    server.end()


def assert_only_whole_models(home: Path) -> None:
    for folder in (home / "adapters").glob("[!.]*"):
        json.loads((folder / "adapter_config.json").read_text())
