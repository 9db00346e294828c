"""The command ``manylora``. It imports nothing heavy before it must, so that ``--help`` is instant."""

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

# How often an idle OpenMP worker looks for work before it sleeps. Waking one costs more than a layer of a
# small model, so it outlasts the pauses in a step, and a slice that another process takes; an idle server
# still sleeps.
_SPINS = 3_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 it failed, 2 it was asked for wrongly."""
    words = sys.argv[1:] if argv is None else list(argv)
    _choose_waiting(training=words[:1] == ["train"])
    # It warns of an optional package whenever it is imported, which is by many others and at many places.
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
    """OpenMP reads its settings once, when torch brings it; what the operator has set stays.

    Training gains nothing from spinning, and takes from whoever shares the machine with it.
    """
    if training:
        if os.environ.get("GOMP_SPINCOUNT") == str(_SPINS):  # from the server whose job this is
            del os.environ["GOMP_SPINCOUNT"]
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def _fail(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    print(f"manylora {arguments.command}: {error}", file=sys.stderr)
    return code


def _parser(bench: bool) -> argparse.ArgumentParser:
    """The whole command line; ``bench`` says whether that command's own parser is worth importing."""
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
        from server.bench.cli import add_parser  # brings an HTTP client

        add_parser(commands)
    else:
        commands.add_parser("bench", help="measure a server")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    config = resolve(arguments, os.environ)
    from server.serve import run  # only now: it brings the HTTP stack

    run(config)


def _version(_: argparse.Namespace) -> None:
    from server.version import VERSION

    print(VERSION)


if __name__ == "__main__":
    sys.exit(main())
