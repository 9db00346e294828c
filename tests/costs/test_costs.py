"""An input of one client must not slow other clients down.

The tests send each kind of input, and twice its size, to a real server.
The server has a tiny model and runs in a child process. The tests take the worst of a few measurements. The
machine may do other work, which only makes figures worse, so a row is repeated before it fails.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from tests.costs.inputs import INPUTS, KIB, MIB, Input
from tests.costs.watch import Cost, watched
from tests.support.running_server import RunningServer, running
from tests.support.tiny_models import make_tiny_model

STALL = 0.75
"""The most seconds that /health may take."""
GAP = 1.0
"""The most seconds between two tokens of another client."""
MEMORY = 64 * MIB
"""The bytes that an input may use in addition to a multiple of its size."""
TIMES = 24
"""The bytes that each byte (or unit) of an input may use, for all its senders together."""
TRIES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_model("llama", home / "model", max_position_embeddings=4096)
    command = [
        sys.executable, "-m", "server.cli", "serve", "--port", "{port}", "--base", str(home / "model"),
        "--kv-cache-memory", "16MiB", "--max-model-len", "4096", "--threads", "1", "--log-level", "warning",
    ]  # fmt: skip
    with untraced(), running(command, home, home / "log") as server:
        warm_up(server)
        yield server
        assert server.process.poll() is None, server.log.read_text()[-2000:]


@contextmanager
def untraced() -> Iterator[None]:
    """Start processes without coverage, because coverage takes time and memory, which these tests measure."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


def warm_up(server: RunningServer) -> None:
    """Send each kind once. Costs that only the first request has do not count."""
    for each in INPUTS:
        cost_of(server, each, max(1, each.small // 8))


def cost_of(server: RunningServer, each: Input, size: int) -> Cost:
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    with watched(server.url, server.process.pid) as cost:
        each.send((address.hostname, address.port), size)
    return cost


def excess(each: Input, size: int, cost: Cost) -> str:
    """The limits that the cost exceeds; "" = none."""
    most = MEMORY + TIMES * size * each.unit
    found = [
        f"/health took {cost.stall:.2f} s" if cost.stall > STALL else "",
        f"a neighbour waited {cost.gap:.2f} s" if cost.gap > GAP else "",
        f"{cost.memory // KIB} KiB were taken, not {most // KIB}" if cost.memory > most else "",
    ]
    return ", ".join(filter(None, found))


def check(server: RunningServer, each: Input, size: int) -> None:
    faults: list[str] = []
    for _ in range(TRIES):
        faults = [f for s in (size, 2 * size) if (f := excess(each, s, cost_of(server, each, s)))]
        if not faults:
            return
    pytest.fail(f"{each.name}, {size} and twice that: {'; '.join(faults)}")


@pytest.mark.parametrize("each", INPUTS, ids=lambda each: each.name)
def test_an_input_does_not_slow_other_clients(server: RunningServer, each: Input) -> None:
    check(server, each, each.small)


@pytest.mark.slow
@pytest.mark.parametrize("each", INPUTS, ids=lambda each: each.name)
def test_a_large_input_does_not_slow_other_clients(server: RunningServer, each: Input) -> None:
    check(server, each, each.large)


def test_an_excess_is_noticed(server: RunningServer) -> None:
    with watched(server.url, server.process.pid) as cost:
        time.sleep(0.3)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(1.3 * GAP)
        server.process.send_signal(signal.SIGCONT)
    assert cost.stall > STALL
    assert cost.gap > GAP
    assert "/health took" in excess(INPUTS[0], 1, cost)
    assert "were taken" in excess(INPUTS[0], 1, Cost(memory=MEMORY + TIMES + 1))


def test_the_names_of_inputs_differ() -> None:
    assert len({each.name for each in INPUTS}) == len(INPUTS)
