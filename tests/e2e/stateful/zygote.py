"""A process that imports the server once and forks it for each order, so a start takes one second, not ten.

An order is a line of JSON, ``{"arguments": [...], "log": path}``. The answer is a line with the server's
process id. A server ends with the zygote, and the zygote ends when its standard input is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import NoReturn

from server import serve
from server.config import from_args
from server.engine.build import build_service
from server.finetune.jobs import command, runner
from tests.e2e.stateful.quick_train import PROGRAM

_PR_SET_PDEATHSIG = 1


def become_server(arguments: list[str], log: str) -> NoReturn:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    command.PROGRAM = PROGRAM
    runner.BUSY_INTERVAL = runner.IDLE_INTERVAL = 0.05
    serve.run(from_args(arguments, {}), build_service)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for them
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become_server(order["arguments"], order["log"])
        print(pid, flush=True)


if __name__ == "__main__":
    main()
