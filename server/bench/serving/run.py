"""Runs ``manylora bench serving``: finds or starts servers, measures them, prints and saves the figures."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from server.bench import plot
from server.bench.errors import BenchError
from server.bench.machine import describe_machine
from server.bench.peers import Runner, Setup, peer
from server.bench.peers.environments import RECIPES, Environment
from server.bench.peers.http import ExternalServer, ManyloraServer
from server.bench.serving import report
from server.bench.serving.client import discover
from server.bench.serving.compare import Measured, measure, say, started, warm_up
from server.bench.serving.endpoint import Endpoint
from server.bench.serving.sweep import Sweep, sweep_adapters, sweep_rates, sweep_shares
from server.bench.serving.workload import Load

_BUSY = (
    "other work runs on this machine (load average {load_average:.1f} on {cores} cores), "
    "so the figures below are not reliable"
)
# For servers that must be given a maximum of requests in flight. More would only take memory.
_MOST_SLOTS = 64
_CONTEXT_STEP = 256


def run_serving(arguments: argparse.Namespace) -> int:
    """Measure, print and save. Returns exit code 0, or 1 if any request failed."""
    _check(arguments)
    machine = describe_machine()
    if machine["load_average"] > machine["cores"]:
        say(_BUSY.format(**machine))
    result = _measure(arguments, _load(arguments))
    config = _config(arguments)
    if isinstance(result, Sweep):
        print(report.sweep_table(result))
        document = report.sweep_document(config, machine, result)
        measured = [one for point in result.points for one in point.measured]
    else:
        print(report.table(result))
        document = report.document(config, machine, result)
        measured = result
    for line in report.errors(measured):
        say(line)
    if arguments.save_result:
        arguments.save_result.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot and isinstance(result, Sweep):
        plot.draw(result, arguments.plot)
    return 1 if any(one.errors for one in measured) else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything starts."""
    if arguments.cold and (arguments.repeats > 1 or arguments.num_warmups):
        raise BenchError("--cold is one run without warm-up; remove --repeats and --num-warmups")
    if arguments.cold and (arguments.sweep_adapters or arguments.sweep_load):
        raise BenchError("--cold is one run, and a sweep is several; remove one of them")
    if arguments.sweep_load and "peft" in arguments.peers:
        raise BenchError("PEFT has no scheduler, so --sweep-load cannot measure it; remove it from --peers")
    if arguments.plot:
        if not (arguments.sweep_adapters or arguments.sweep_load):
            raise BenchError("--plot plots a sweep; add --sweep-adapters or --sweep-load")
        plot.check_available()


def _load(arguments: argparse.Namespace) -> Load:
    low, high = arguments.random_token_range
    if low >= high:
        raise BenchError(f"--random-token-range {low} {high} is empty; LOW must be less than HIGH")
    return Load(
        num_prompts=arguments.num_prompts or _most_adapters(arguments),
        input_len=arguments.random_input_len,
        output_len=arguments.random_output_len,
        popularity=arguments.adapter_popularity,
        request_rate=arguments.request_rate,
        max_concurrency=arguments.max_concurrency,
        token_range=(low, high),
        seed=arguments.seed,
    )


def _most_adapters(arguments: argparse.Namespace) -> int:
    """The default number of adapters and of requests."""
    return max(arguments.sweep_adapters or (16,))


def _measure(arguments: argparse.Namespace, load: Load) -> list[Measured] | Sweep:
    with tempfile.TemporaryDirectory(prefix="manylora-bench-") as scratch:
        prepare = _external if arguments.base_url else _own
        runners, setup = prepare(arguments, load, Path(scratch))
        with started(runners, setup):
            if not arguments.cold:
                num_warmups = load.num_prompts if arguments.num_warmups is None else arguments.num_warmups
                warm_up(runners, setup, load, num_warmups)
            return _points(arguments, runners, setup, load)


def _points(
    arguments: argparse.Namespace, runners: Sequence[Runner], setup: Setup, load: Load
) -> list[Measured] | Sweep:
    """The sweep that is asked for, or one comparison."""
    if arguments.sweep_adapters:
        return sweep_adapters(runners, setup, load, arguments.sweep_adapters, arguments.repeats)
    if arguments.sweep_load:
        sweep = sweep_shares if arguments.sweep_load.relative else sweep_rates
        return sweep(runners, setup, load, arguments.sweep_load.values, arguments.repeats)
    return measure(runners, setup, [load] * len(runners), arguments.repeats)


def _external(arguments: argparse.Namespace, load: Load, scratch: Path) -> tuple[list[Runner], Setup]:
    """The running server. Its adapters are only names here."""
    if arguments.peers or arguments.server_args:
        raise BenchError("--peers and flags after -- need a server that is started here; remove --base-url")
    api_key = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    if not arguments.model:
        base, adapters = asyncio.run(discover(arguments.base_url, api_key))
    elif arguments.adapter_popularity == "base":
        base, adapters = arguments.model[0], ()
    else:
        base, adapters = "", tuple(arguments.model)
    endpoint = Endpoint(arguments.base_url, base, arguments.endpoint, api_key)
    return [ExternalServer(endpoint)], _setup(
        arguments, load, scratch, scratch, dict.fromkeys(adapters, scratch)
    )


def _own(arguments: argparse.Namespace, load: Load, scratch: Path) -> tuple[list[Runner], Setup]:
    """Our server and the peers, on one prepared base and synthetic adapters."""
    from adapters.base import prepare_base
    from server.bench.serving.synthetic import write_adapters
    from server.config import from_args

    if arguments.model or arguments.api_key:
        raise BenchError("--model and --api-key need --base-url; add it, or remove them")
    peers = [peer(name) for name in arguments.peers]
    for name in {name.partition(":")[0] for name in arguments.peers} & RECIPES.keys():
        Environment(name, arguments.home).require()
    asked = from_args(arguments.server_args).model
    base = prepare_base(arguments.base, arguments.home, asked.quantization, asked.head_quantization)
    folder = scratch / "adapters"
    folder.mkdir()
    count = _most_adapters(arguments) if arguments.num_adapters is None else arguments.num_adapters
    adapters = write_adapters(base, folder, count, arguments.adapter_rank, arguments.seed)
    ours = ManyloraServer(arguments.endpoint, arguments.server_args)
    return [ours, *peers], _setup(arguments, load, scratch, base.path, adapters)


def _setup(
    arguments: argparse.Namespace, load: Load, scratch: Path, base: Path, adapters: dict[str, Path]
) -> Setup:
    in_flight = min(load.num_prompts, load.max_concurrency or load.num_prompts)
    tokens = load.input_len + load.output_len
    return Setup(
        base=base,
        adapters=adapters,
        scratch=scratch,
        source=arguments.base,
        home=arguments.home,
        slots=min(in_flight, _MOST_SLOTS),
        context=-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP,
    )


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole command as parsed, without the key."""
    left_out = {"run", "api_key"}
    return {key: _plain(value) for key, value in vars(arguments).items() if key not in left_out}


def _plain(value: Any) -> Any:
    """``value`` as a JSON value."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value) if isinstance(value, Path) else value
