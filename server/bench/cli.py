"""``manylora bench``: its sub-commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import ManyloraError
from server.bench import model_step, options, step
from server.bench.errors import BenchError
from server.bench.gpu_check import command as gpu_check
from server.bench.peers.environments import RECIPES, Environment
from server.bench.serving.compare import say
from server.bench.shapes import SHAPES, make_model
from server.finetune.evaluation import prove

if TYPE_CHECKING:
    # argparse's sub-parsers have no public type
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SERVING = """\
Send requests of an exact shape to an OpenAI-compatible server and measure throughput, latency and memory.

With --base-url, only the server at that address is contacted. Without it, manylora is started on a free
loopback port with synthetic adapters, measured and stopped. Flags after -- are passed to it:

  manylora bench serving --num-adapters 16 --peers llama.cpp,vllm,peft -- --max-loras 16
  manylora bench serving --sweep-adapters 1,2,4,8,16,32,64 --peers llama.cpp --plot adapters.png
  manylora bench serving --base-url http://127.0.0.1:8000 --max-concurrency 8

server/bench/serving/stats.py and server/bench/memory.py define each figure.
"""

_PEERS_SETUP = """\
Make the environments that --peers needs, under DIR/peers. Complete ones are not made again.

  llama.cpp  built from its source release (about 10 minutes; needs a C++ compiler)
  vllm       the CPU build and its requirements (about 3 GB; needs an index that has torch's CPU build)

peft needs none. Everything comes from the package index that pip is configured with.
"""


def add_parser(subparsers: SubParsers) -> None:
    """Add ``bench`` and its sub-commands. ``arguments.run(arguments)`` returns the exit code."""
    bench = subparsers.add_parser("bench", help="measure a server")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    serving = _kind(kinds, "serving", "measure an OpenAI-compatible server", _SERVING, _serving)
    options.add_target_options(serving)
    options.add_load_options(serving)
    options.add_report_options(serving)
    setup = _kind(kinds, "peers-setup", "install the servers to compare with", _PEERS_SETUP, run_peers_setup)
    setup.add_argument("peers", nargs="*", metavar="PEER", help=f"{', '.join(RECIPES)} (default: all)")
    options.add_home(setup)
    step.add_parser(kinds)
    model_step.add_parser(kinds)
    gpu_check.add_parser(kinds)
    prove.add_parser(kinds)
    make = _kind(kinds, "make-model", "write a model of random weights", None, run_make_model)
    make.add_argument("--shape", choices=SHAPES, required=True)
    make.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder to write; it must not exist"
    )
    make.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    options.add_home(make)


def _kind(
    kinds: SubParsers,
    name: str,
    summary: str,
    description: str | None,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_in_one_line(name, run))
    return parser


def _in_one_line(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """``run``, but a ``ManyloraError`` becomes one line on stderr and exit code 2."""

    def wrapped(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except ManyloraError as error:
            print(f"manylora bench {name}: {error}", file=sys.stderr)
            return 2

    return wrapped


def _serving(arguments: argparse.Namespace) -> int:
    from server.bench.serving.run import run_serving  # imports HTTP clients, which GPU machines may lack

    return run_serving(arguments)


def run_peers_setup(arguments: argparse.Namespace) -> int:
    """Set up the named peers, or all. Returns exit code 0."""
    unknown = [name for name in arguments.peers if name not in RECIPES]
    if unknown:
        raise BenchError(f"{unknown[0]!r} has no environment to set up; choose from: {', '.join(RECIPES)}")
    for name in arguments.peers or RECIPES:
        Environment(name, arguments.home).set_up(say)
    return 0


def run_make_model(arguments: argparse.Namespace) -> int:
    """Write the model, with the default base's tokenizer. Returns exit code 0."""
    from adapters.base import DEFAULT_BASE, prepare_base

    tokenizer = prepare_base(DEFAULT_BASE, arguments.home).path
    make_model(SHAPES[arguments.shape], tokenizer, arguments.output, arguments.seed)
    return 0
