"""Runners of servers with OpenAI's HTTP API: a running one, one that is started here, and manylora."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from server.bench.errors import BenchError
from server.bench.peers import Setup
from server.bench.peers.process import ChildProcess
from server.bench.serving.client import discover, play
from server.bench.serving.endpoint import Endpoint, Path
from server.bench.serving.stats import RunResult
from server.bench.serving.workload import Workload

# The first start may include quantising a large base.
_START_TIMEOUT_S = 900.0


class ExternalServer:
    """A server that runs already. It is neither started nor stopped."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    @property
    def name(self) -> str:
        return self._endpoint.base_url.partition("://")[2]

    @property
    def pid(self) -> None:
        """None: its process was not started here."""

    def start(self, setup: Setup) -> None:
        """Do nothing: it runs already."""

    def run(self, workload: Workload) -> RunResult:
        return asyncio.run(play(self._endpoint, workload))

    def stop(self) -> None:
        """Do nothing: it was not started here."""


class HttpServer(ABC):
    """A server that is a child process on a free loopback port."""

    name: str
    ready_path = "/health"

    def __init__(self, path: Path = "/v1/completions") -> None:
        self._path = path
        self._process: ChildProcess | None = None
        self._endpoint: Endpoint | None = None

    @abstractmethod
    def command(self, setup: Setup, port: int) -> list[str]:
        """Make what the server needs, and return the command line that serves ``setup`` on 127.0.0.1."""

    def environment(self, setup: Setup) -> Mapping[str, str]:  # noqa: ARG002 (used by subclasses)
        """Environment variables for the command, besides those of this process."""
        return {}

    def known(self, url: str) -> set[str]:
        """The adapters that it serves now."""
        return set(asyncio.run(discover(url, None))[1])

    def fields(self, url: str) -> Mapping[str | None, Mapping[str, Any]]:  # noqa: ARG002
        """See ``Endpoint.fields``."""
        return {}

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, setup: Setup) -> None:
        port = free_port()
        self._process = ChildProcess(
            self.command(setup, port), setup.scratch / f"{self.name}.log", environment=self.environment(setup)
        )
        url = f"http://127.0.0.1:{port}"
        self._wait(lambda: httpx.get(url + self.ready_path, trust_env=False).status_code == 200)
        self._wait(lambda: set(setup.adapters) <= self.known(url))
        base = asyncio.run(discover(url, None))[0]
        self._endpoint = Endpoint(url, base, self._path, fields=self.fields(url))

    def _wait(self, done: Callable[[], bool]) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            self._process.check_alive()
            try:
                if done():
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.1)
        tail = self._process.log_tail()
        raise BenchError(f"{self.name} was not ready after {_START_TIMEOUT_S:.0f} s; its log ends:\n{tail}")

    @property
    def endpoint(self) -> Endpoint:
        """Its endpoint, once started."""
        assert self._endpoint is not None, "start comes first"
        return self._endpoint

    def run(self, workload: Workload) -> RunResult:
        return asyncio.run(play(self.endpoint, workload))

    def stop(self) -> None:
        if self._process:
            self._process.stop()


class ManyloraServer(HttpServer):
    """manylora. ``server_args`` are more flags of ``manylora serve``; they override those set here."""

    name = "manylora"
    ready_path = "/ready"

    def __init__(self, path: Path = "/v1/completions", server_args: Sequence[str] = ()) -> None:
        super().__init__(path)
        self._server_args = list(server_args)

    def command(self, setup: Setup, port: int) -> list[str]:
        flags = {
            "--home": setup.scratch / "home",
            "--base": setup.base,
            "--adapter-dir": setup.scratch / "adapters",
            "--host": "127.0.0.1",
            "--port": port,
        }
        return [
            *(sys.executable, "-m", "server.cli", "serve"),
            *(str(part) for flag in flags.items() for part in flag),
            *self._server_args,
        ]


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
