"""``manylora bench serving``: the command line. Flags are named as ``vllm bench serve`` names them."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ManyloraError
from server.bench import report
from server.bench.client import PATHS, Endpoint, discover
from server.bench.compare import Measured, measure
from server.bench.errors import BenchError
from server.bench.machine import describe_machine
from server.bench.peers import PEERS, Runner, Setup, peer
from server.bench.peers.http import ExternalServer, ManyloraServer
from server.bench.workload import POPULARITIES, Load

if TYPE_CHECKING:
    # argparse's sub-parsers have no public type
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Send requests of an exact shape to an OpenAI-compatible server and measure throughput and latency.

With --base-url the server is yours: only that address is contacted. Without it, our own server is started
on a free loopback port with synthetic adapters, measured and stopped; flags after -- are passed to it:

  manylora bench serving --num-adapters 16 --peers peft -- --max-loras 16
  manylora bench serving --base-url http://127.0.0.1:8000 --max-concurrency 8

How each figure is defined is written in server/bench/stats.py.
"""

_BUSY = (
    "other work runs here (load average {load_average:.1f} on {cores} cores): threads that share a step "
    "suffer most, and no figure below is to be trusted"
)


def add_parser(subparsers: SubParsers) -> None:
    """Add ``bench`` and its kinds; the parsed arguments' ``run`` takes them and gives the exit code."""
    bench = subparsers.add_parser("bench", help="measure a server")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    serving = kinds.add_parser(
        "serving",
        help="throughput and latency of an OpenAI-compatible server",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target_options(serving)
    _add_load_options(serving)
    _add_report_options(serving)
    serving.set_defaults(run=run_serving)


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    theirs = parser.add_argument_group("a server that runs already")
    theirs.add_argument("--base-url", metavar="URL", help="scheme, host and port of the server")
    theirs.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to ask, chosen among by --adapter-popularity (default: what its /v1/models lists)",
    )
    theirs.add_argument("--api-key", metavar="KEY", help="bearer key (safer: the variable OPENAI_API_KEY)")
    ours = parser.add_argument_group("our own server, started for the measurement")
    ours.add_argument(
        "--base", default="smollm2-135m", metavar="MODEL", help="base model (default: %(default)s)"
    )
    ours.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("MANYLORA_HOME", ".manylora")),
        metavar="DIR",
        help="state folder that keeps the prepared base (default: %(default)s)",
    )
    ours.add_argument(
        "--num-adapters", type=_at_least(0), default=16, metavar="N", help="(default: %(default)s)"
    )
    ours.add_argument(
        "--adapter-rank", type=_at_least(1), default=16, metavar="R", help="(default: %(default)s)"
    )
    ours.add_argument(
        "--peers", type=_peers, default=(), metavar="NAME,…", help=f"compare with: {', '.join(PEERS)}"
    )
    ours.add_argument("server_args", nargs="*", metavar="-- FLAG", help="further flags of manylora serve")


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument("--endpoint", choices=PATHS, default=PATHS[0], help="(default: %(default)s)")
    load.add_argument(
        "--num-prompts", type=_at_least(1), default=16, metavar="N", help="(default: %(default)s)"
    )
    load.add_argument("--max-concurrency", type=_at_least(1), metavar="N", help="most requests in flight")
    load.add_argument(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="R",
        help="mean requests per second of a Poisson process; inf: all at once (default)",
    )
    load.add_argument(
        "--random-input-len", type=_at_least(1), default=200, metavar="N", help="(default: %(default)s)"
    )
    load.add_argument(
        "--random-output-len", type=_at_least(1), default=64, metavar="N", help="(default: %(default)s)"
    )
    load.add_argument(
        "--random-token-range",
        type=_at_least(0),
        nargs=2,
        default=(1000, 30000),
        metavar=("LOW", "HIGH"),
        help="prompts draw token ids from LOW up to HIGH - 1 (default: 1000 30000)",
    )
    load.add_argument(
        "--adapter-popularity",
        choices=POPULARITIES,
        default="distinct",
        help="each adapter in turn, any, the k-th with chance 1/k, the first alone, none (default: distinct)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    reporting = parser.add_argument_group("measurement")
    reporting.add_argument(
        "--num-warmups",
        "--warmup",
        type=_at_least(0),
        metavar="N",
        help="requests before measuring (default: as many as --num-prompts)",
    )
    reporting.add_argument(
        "--repeats",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="runs; the median is shown (default: %(default)s)",
    )
    reporting.add_argument("--save-result", type=Path, metavar="FILE", help="write everything as JSON")


def run_serving(arguments: argparse.Namespace) -> int:
    """Measure, print and save. Exit code 0; 1 if any request failed; 2 if there was nothing to measure."""
    try:
        load = _load(arguments)
        measured, machine = _measure(arguments, load)
    except ManyloraError as error:
        print(f"manylora bench serving: {error}", file=sys.stderr)
        return 2
    print(report.table(measured))
    for line in report.errors(measured):
        print(line, file=sys.stderr)
    if arguments.save_result:
        everything = report.document(_config(arguments), machine, measured)
        arguments.save_result.write_text(json.dumps(everything, indent=2) + "\n")
    return 1 if any(one.errors for one in measured) else 0


def _load(arguments: argparse.Namespace) -> Load:
    low, high = arguments.random_token_range
    if low >= high:
        raise BenchError(f"--random-token-range {low} {high} is empty; LOW must be less than HIGH")
    return Load(
        num_prompts=arguments.num_prompts,
        input_len=arguments.random_input_len,
        output_len=arguments.random_output_len,
        popularity=arguments.adapter_popularity,
        request_rate=arguments.request_rate,
        max_concurrency=arguments.max_concurrency,
        token_range=(low, high),
        seed=arguments.seed,
    )


def _measure(arguments: argparse.Namespace, load: Load) -> tuple[list[Measured], dict[str, Any]]:
    machine = describe_machine()
    if machine["load_average"] > machine["cores"]:
        print(_BUSY.format(**machine), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="manylora-bench-") as scratch:
        prepare = _external if arguments.base_url else _own
        runners, setup = prepare(arguments, Path(scratch))
        num_warmups = load.num_prompts if arguments.num_warmups is None else arguments.num_warmups
        return measure(runners, setup, load, arguments.repeats, num_warmups), machine


def _external(arguments: argparse.Namespace, scratch: Path) -> tuple[list[Runner], Setup]:
    """The operator's server; its adapters are names only."""
    if arguments.peers or arguments.server_args:
        raise BenchError("--peers and flags after -- go with our own server; leave --base-url out")
    api_key = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    if not arguments.model:
        base, adapters = asyncio.run(discover(arguments.base_url, api_key))
    elif arguments.adapter_popularity == "base":
        base, adapters = arguments.model[0], ()
    else:
        base, adapters = "", tuple(arguments.model)
    endpoint = Endpoint(arguments.base_url, base, arguments.endpoint, api_key)
    return [ExternalServer(endpoint)], Setup(scratch, dict.fromkeys(adapters, scratch), scratch)


def _own(arguments: argparse.Namespace, scratch: Path) -> tuple[list[Runner], Setup]:
    """Our server and the peers, on one prepared base and synthetic adapters."""
    from adapters.base import prepare_base
    from server.bench.synthetic import write_adapters

    if arguments.model or arguments.api_key:
        raise BenchError("--model and --api-key go with --base-url; our own server needs neither")
    base = prepare_base(arguments.base, arguments.home).path
    folder = scratch / "adapters"
    folder.mkdir()
    adapters = write_adapters(base, folder, arguments.num_adapters, arguments.adapter_rank, arguments.seed)
    ours = ManyloraServer(arguments.endpoint, arguments.server_args)
    return [ours, *map(peer, arguments.peers)], Setup(base, adapters, scratch)


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole command as parsed, but for the key."""
    left_out = {"run", "api_key"}
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in left_out
    }


def _at_least(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``low`` up."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {low}")
        return int(text)

    return parse


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, or inf")
    return rate


def _peers(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; known peers: {', '.join(PEERS)}")
    return names
