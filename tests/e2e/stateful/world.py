"""The server under test, its adapter directory, and the ready-made adapters that the test deploys."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.project import ROOT
from tests.support.running_server import free_port
from tests.support.tiny_models import make_peft_adapter, make_tiny_model
from tests.support.waiting import wait_until

BASE = "tiny"
VARIANTS = 3
START_SECONDS = 60
SIZES = ("--threads", "1", "--lora-pool-rows", "16", "--max-lora-rank", "8", "--lora-host-memory", "256KiB")
LIMITS = ("--kv-cache-memory", "256KiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")


class World:
    """One state folder and its server, which may be killed and restarted.

    Attributes:
        adapters: the watched directory.
        digests: the digests of the ready-made adapters. Jobs publish the last one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.adapters = self.home / "adapters"
        self.log = folder / "serve.log"
        self._model = make_tiny_model("llama", folder / BASE)
        self.variants = [self._make_variant(i) for i in range(VARIANTS)]
        shutil.copytree(self._make_variant(VARIANTS), folder / "trained")
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.stateful.zygote"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.start()
        self.digests = [self._digest_of(folder) for folder in (*self.variants, folder / "trained")]

    def _make_variant(self, number: int) -> Path:
        return make_peft_adapter(self._model, self.folder / f"variant{number}", r=2 + 2 * number, seed=number)

    # -- the server -------------------------------------------------------------------------------

    def start(self) -> None:
        port = free_port()
        arguments = ["--base", str(self._model), "--home", str(self.home), "--port", str(port)]
        order = {"arguments": [*arguments, *SIZES, *LIMITS], "log": str(self.log)}
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        self._pid = int(self._zygote.stdout.readline())
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        wait_until(self._is_ready, START_SECONDS)

    def _is_ready(self) -> bool:
        assert self._lives(), self.log.read_text(errors="replace")[-3000:]
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _lives(self) -> bool:
        with suppress(ProcessLookupError):
            os.kill(self._pid, 0)
            return True
        return False

    def end(self, number: signal.Signals) -> None:
        """Send the signal and wait until the process is gone."""
        self.http.close()
        os.kill(self._pid, number)
        wait_until(lambda: not self._lives(), 30)

    def close(self) -> None:
        self.end(signal.SIGKILL)
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        self._zygote.wait(10)

    def metric(self, name: str) -> float:
        """The value of the unlabelled sample ``manylora_<name>``."""
        families = text_string_to_metric_families(self.http.get("/metrics").raise_for_status().text)
        samples = (sample for family in families for sample in family.samples)
        return next(sample.value for sample in samples if sample.name == f"manylora_{name}")

    def listing(self) -> dict[str, dict[str, Any]]:
        rows = self.http.get("/v1/adapters").raise_for_status().json()["data"]
        return {row["name"]: row for row in rows if row["state"] != "draining"}

    # -- folders ----------------------------------------------------------------------------------

    def deploy(self, source: Path, name: str) -> None:
        """Copy the adapter beside its target and rename it, as the documentation advises."""
        copy, old = self.adapters / f".{name}.new.tmp", self.adapters / f".{name}.old.tmp"
        shutil.copytree(source, copy)
        with suppress(FileNotFoundError):
            (self.adapters / name).rename(old)
        copy.rename(self.adapters / name)
        remove(old)

    def _digest_of(self, source: Path) -> str:
        self.deploy(source, "probe")
        wait_until(lambda: self.listing().get("probe", {}).get("digest") is not None, START_SECONDS)
        digest: str = self.listing()["probe"]["digest"]
        remove(self.adapters / "probe")
        wait_until(lambda: "probe" not in self.listing(), START_SECONDS)
        return digest


def remove(path: Path) -> None:
    """Remove a folder, a file or a link. It may be absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def content(folder: Path) -> str:
    """A hash of a folder's names and bytes."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(str(path.relative_to(folder)).encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def within(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition becomes true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
