"""A real server in a child process, with its log in a file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.support import sharding
from tests.support.project import ROOT
from tests.support.waiting import wait_until

SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 120
"""Much more than a start takes, because the machine may do other work."""
# Variables of an outer `make test`, or of the user, that would change the server under test.
FOREIGN = ("MANYLORA_", "MAKE", "MFLAGS")


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is or was ready.

    Attributes:
        home: its state folder.
        log: the file with its stdout and stderr.
    """

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    log: Path

    @property
    def adapters(self) -> Path:
        return self.home / "adapters"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """The value of the unlabelled sample ``manylora_<name>``."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return next(sample.value for sample in samples if sample.name == f"manylora_{name}")


@contextmanager
def running(command: list[str], home: Path, log: Path) -> Iterator[RunningServer]:
    """Start ``command`` with a free port for ``{port}`` and wait until it is ready. SIGTERM at the end."""
    port = str(free_port())
    environ = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    environ |= {"MANYLORA_HOME": str(home)} | sharding.ENVIRON
    with log.open("wb") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in command], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    server = RunningServer(process, f"http://127.0.0.1:{port}", home, log)
    try:
        wait_until(lambda: is_ready(server), START_SECONDS)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def make_serve() -> list[str]:
    """``make serve`` in the environment of the tests, so that nothing is installed."""
    venv = SCRIPTS.parent
    return ["make", "serve", f"VENV={venv}", f"--assume-old={venv}/.installed", "PORT={port}"]


def is_ready(server: RunningServer) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        return httpx.get(f"{server.url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
