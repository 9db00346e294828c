"""The command ``manylora``. It imports slow modules only when a command needs them, so ``--help`` is fast."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from adapters.errors import ManyloraError
from server.config import ConfigError, resolve
from server.config.options import USAGE, OneLineParser, add_options
from server.finetune.command.cli import add_parser as add_training
from server.finetune.evaluation.cli import add_parser as add_evaluation

# How often an idle OpenMP worker looks for work before it sleeps. Waking a worker takes longer than a layer
# of a small model. With this number, workers stay awake during a step, and while another process has the CPU
# for one time slice. The workers of an idle server still sleep.
_SPINS = 3_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit code is 0 for success, 1 for a failure, 2 for wrong arguments."""
    words = sys.argv[1:] if argv is None else list(argv)
    _choose_waiting(training=words[:1] == ["train"])
    # bitsandbytes warns about an optional package at its import, and many modules import it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    arguments = _parser(bench=words[:1] == ["bench"]).parse_args(words)
    run: Callable[[argparse.Namespace], int | None] = arguments.run
    try:
        return run(arguments) or 0
    except ConfigError as error:
        return _fail(arguments, error, 2)
    except ManyloraError as error:
        return _fail(arguments, error, 1)
    except KeyboardInterrupt:
        return 130


def _choose_waiting(training: bool) -> None:
    """Set how long OpenMP's workers spin, before torch loads OpenMP. The operator's own settings stay.

    Training does not get faster by spinning, and would slow down other processes on the machine.
    """
    if training:
        if os.environ.get("GOMP_SPINCOUNT") == str(_SPINS):  # inherited from the server that runs this job
            del os.environ["GOMP_SPINCOUNT"]
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def _fail(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    print(f"manylora {arguments.command}: {error}", file=sys.stderr)
    return code


def _parser(bench: bool) -> argparse.ArgumentParser:
    """The parser of all commands. ``bench``: also import the parser of that command, which is slow."""
    parser: argparse.ArgumentParser = OneLineParser(
        prog="manylora", description="Many LoRA adapters on one 4-bit base, in one batch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve a base and its adapters", usage=USAGE, allow_abbrev=False
    )
    add_options(serve)
    serve.set_defaults(run=_serve)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    add_evaluation(commands)
    add_training(commands)
    if bench:
        from server.bench.cli import add_parser  # imports an HTTP client

        add_parser(commands)
    else:
        commands.add_parser("bench", help="measure a server")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    config = resolve(arguments, os.environ)
    from server.serve import run  # imports the HTTP stack

    run(config)


def _version(_: argparse.Namespace) -> None:
    from server.version import VERSION

    print(VERSION)


if __name__ == "__main__":
    sys.exit(main())
