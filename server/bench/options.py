"""The flags of ``manylora bench serving``, named as ``vllm bench serve`` names them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from server.bench.errors import BenchError
from server.bench.peers import PEERS, peer
from server.bench.serving.endpoint import PATHS
from server.bench.serving.workload import POPULARITIES

if TYPE_CHECKING:
    # argparse's groups have no public type
    ArgumentGroup: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


def add_target_options(parser: argparse.ArgumentParser) -> None:
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
    add_home(ours)
    ours.add_argument(
        "--num-adapters",
        type=_at_least(0),
        metavar="N",
        help="(default: 16, or the most that --sweep-adapters asks for)",
    )
    ours.add_argument(
        "--adapter-rank", type=_at_least(1), default=16, metavar="R", help="(default: %(default)s)"
    )
    ours.add_argument(
        "--peers",
        type=_peers,
        default=(),
        metavar="NAME,…",
        help=f"compare with: {', '.join(PEERS)}, llama.cpp:QUANT, vllm:eager; see manylora bench peers-setup",
    )
    ours.add_argument("server_args", nargs="*", metavar="-- FLAG", help="further flags of manylora serve")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument("--endpoint", choices=PATHS, default=PATHS[0], help="(default: %(default)s)")
    load.add_argument(
        "--num-prompts",
        type=_at_least(1),
        metavar="N",
        help="(default: 16, or the most adapters of --sweep-adapters)",
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
        help="random token ids of prompts, from LOW to HIGH - 1 (default: 1000 30000)",
    )
    load.add_argument(
        "--adapter-popularity",
        choices=POPULARITIES,
        default="distinct",
        help="each adapter in turn, any, the k-th with chance 1/k, the first alone, none (default: distinct)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    reporting = parser.add_argument_group("measurement")
    reporting.add_argument(
        "--num-warmups",
        "--warmup",
        type=_at_least(0),
        metavar="N",
        help="requests before measuring, after one to each adapter (default: as many as --num-prompts)",
    )
    reporting.add_argument(
        "--cold", action="store_true", help="no request before measuring, and none to the adapters"
    )
    reporting.add_argument(
        "--repeats",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="runs; the median is shown (default: %(default)s)",
    )
    sweeps = reporting.add_mutually_exclusive_group()
    sweeps.add_argument(
        "--sweep-adapters",
        type=_counts,
        metavar="N,…",
        help="throughput against the number of distinct adapters, such as 1,2,4,8,16,32,64",
    )
    sweeps.add_argument(
        "--sweep-load",
        type=_rates,
        metavar="R,…",
        help="latency against the load: requests/s, or shares of each server's own saturation (50%%,70%%)",
    )
    reporting.add_argument("--save-result", type=Path, metavar="FILE", help="write everything as JSON")
    reporting.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the sweep (needs matplotlib)")


def add_home(parser: ArgumentGroup) -> None:
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("MANYLORA_HOME", ".manylora")),
        metavar="DIR",
        help="state folder with the prepared base and the peers (default: %(default)s)",
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """What ``--sweep-load`` names: requests per second, or percentages of a server's own saturation."""

    values: tuple[float, ...]
    relative: bool


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


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_at_least(1), text.split(",")))


def _rates(text: str) -> Rates:
    words = text.split(",")
    relative = [word.endswith("%") for word in words]
    if any(relative) and not all(relative):
        raise argparse.ArgumentTypeError(f"{text!r} mixes requests/s and percentages; give one kind")
    values = tuple(_rate(word.removesuffix("%")) for word in words)
    if math.inf in values:
        raise argparse.ArgumentTypeError(f"{text!r} must be finite; an unbounded rate is no load to sweep")
    return Rates(values, all(relative))


def _peers(text: str) -> tuple[str, ...]:
    """Names separated by commas, each one of ``PEERS``, perhaps with ``:variant``."""
    names = tuple(text.split(","))
    for name in names:
        try:
            peer(name)
        except BenchError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names
