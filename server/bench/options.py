"""The flags of ``manylora bench serving``, named as ``vllm bench serve`` names them."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from server.bench.errors import BenchError
from server.bench.peers import PEERS, peer
from server.bench.serving.endpoint import PATHS
from server.bench.serving.workload import POPULARITIES
from server.config.values import argument, integer

if TYPE_CHECKING:
    # argparse's groups have no public type
    ArgumentGroup: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup

_COUNT, _POSITIVE = argument(integer(0)), argument(integer(1))


def add_target_options(parser: argparse.ArgumentParser) -> None:
    theirs = parser.add_argument_group("a running server")
    theirs.add_argument("--base-url", metavar="URL", help="scheme, host and port of the server")
    theirs.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to ask, shared as --adapter-popularity says (default: all that its /v1/models lists)",
    )
    theirs.add_argument("--api-key", metavar="KEY", help="bearer key; the variable OPENAI_API_KEY is safer")
    ours = parser.add_argument_group("manylora, started for the measurement")
    ours.add_argument(
        "--base", default="smollm2-135m", metavar="MODEL", help="base model (default: %(default)s)"
    )
    add_home(ours)
    ours.add_argument(
        "--num-adapters",
        type=_COUNT,
        metavar="N",
        help="adapters to make (default: 16, or the largest of --sweep-adapters)",
    )
    ours.add_argument(
        "--adapter-rank", type=_POSITIVE, default=16, metavar="R", help="(default: %(default)s)"
    )
    ours.add_argument(
        "--peers",
        type=_peers,
        default=(),
        metavar="NAME,…",
        help=f"compare with {', '.join(PEERS)}, llama.cpp:QUANT, vllm:eager; see manylora bench peers-setup",
    )
    ours.add_argument("server_args", nargs="*", metavar="-- FLAG", help="more flags for manylora serve")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument("--endpoint", choices=PATHS, default=PATHS[0], help="(default: %(default)s)")
    load.add_argument(
        "--num-prompts",
        type=_POSITIVE,
        metavar="N",
        help="requests of a run (default: 16, or the largest of --sweep-adapters)",
    )
    load.add_argument("--max-concurrency", type=_POSITIVE, metavar="N", help="most requests in flight")
    load.add_argument(
        "--request-rate",
        type=_rate,
        default=math.inf,
        metavar="R",
        help="mean requests/s of a Poisson process; inf sends all at once (default)",
    )
    load.add_argument(
        "--random-input-len", type=_POSITIVE, default=200, metavar="N", help="(default: %(default)s)"
    )
    load.add_argument(
        "--random-output-len", type=_POSITIVE, default=64, metavar="N", help="(default: %(default)s)"
    )
    load.add_argument(
        "--random-token-range",
        type=_COUNT,
        nargs=2,
        default=(1000, 30000),
        metavar=("LOW", "HIGH"),
        help="prompts have random token ids from LOW to HIGH - 1 (default: 1000 30000)",
    )
    load.add_argument(
        "--adapter-popularity",
        choices=POPULARITIES,
        default="distinct",
        help="distinct: each adapter in turn; uniform: any; zipf: the k-th with a chance of about 1/k; "
        "identical: only the first; base: none (default: distinct)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    reporting = parser.add_argument_group("measurement")
    reporting.add_argument(
        "--num-warmups",
        "--warmup",
        type=_COUNT,
        metavar="N",
        help="requests of the load before measuring, after one to each adapter (default: --num-prompts)",
    )
    reporting.add_argument("--cold", action="store_true", help="send no request before measuring")
    reporting.add_argument(
        "--repeats",
        type=_POSITIVE,
        default=1,
        metavar="N",
        help="runs, of which the median is shown (default: %(default)s)",
    )
    sweeps = reporting.add_mutually_exclusive_group()
    sweeps.add_argument(
        "--sweep-adapters",
        type=_counts,
        metavar="N,…",
        help="measure throughput by number of distinct adapters, such as 1,2,4,8,16,32,64",
    )
    sweeps.add_argument(
        "--sweep-load",
        type=_rates,
        metavar="R,…",
        help="measure latency by load: requests/s, or percentages of each server's saturation (50%%,70%%)",
    )
    reporting.add_argument("--save-result", type=Path, metavar="FILE", help="write all figures as JSON")
    reporting.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the sweep (needs matplotlib)")


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
    """The values of ``--sweep-load``.

    Attributes:
        relative: they are percentages of a server's own saturation, not requests per second.
    """

    values: tuple[float, ...]
    relative: bool


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, or inf")
    return rate


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_POSITIVE, text.split(",")))


def _rates(text: str) -> Rates:
    words = text.split(",")
    relative = [word.endswith("%") for word in words]
    if any(relative) and not all(relative):
        raise argparse.ArgumentTypeError(f"{text!r} mixes requests/s and percentages; give one kind")
    values = tuple(_rate(word.removesuffix("%")) for word in words)
    if math.inf in values:
        raise argparse.ArgumentTypeError(f"{text!r} must be finite; a sweep needs bounded rates")
    return Rates(values, all(relative))


def _peers(text: str) -> tuple[str, ...]:
    """Names separated by commas: each is one of ``PEERS``, optionally followed by ``:variant``."""
    names = tuple(text.split(","))
    for name in names:
        try:
            peer(name)
        except BenchError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names
