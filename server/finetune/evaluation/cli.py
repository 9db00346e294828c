"""``manylora eval`` compares an adapter, published or not, with the base on held-out rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterNameInvalid, AdapterNotFound
from adapters.paths import folder_name, resolve_under
from server.config import ServerConfig
from server.config.shared_options import add_served, served_config
from server.finetune.subcommand import BASE_OPTIONS, add_subcommand

if TYPE_CHECKING:
    from server.finetune.evaluation.result import Answers
    from server.finetune.subcommand import SubParsers

_DESCRIPTION = """\
Measure an adapter and the base on held-out rows, both in the same batches of the serving engine.

loss         mean negative log-likelihood of the assistant's tokens, encoded as in training
exact match  share of the rows with a short reference (at most 16 words) whose greedy answer equals it, apart
             from white space at both ends
token F1     mean word overlap on the same rows, as SQuAD counts it
"""
_SHARED = (*BASE_OPTIONS, "--kv-cache-memory", "--gpu-memory-utilization", "--threads")


def add_parser(commands: SubParsers) -> None:
    """Add the command ``eval``. Heavy modules are imported only when it runs."""
    parser = add_subcommand(commands, "eval", "measure an adapter on held-out rows", _DESCRIPTION)
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="NAME|DIR",
        help="a name in the adapter folder, or any PEFT folder",
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="held-out rows, in the formats of manylora train",
    )
    parser.add_argument(
        "--replaces", metavar="NAME|DIR", help="also measure the version that the adapter would replace"
    )
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="write the answers to rows with a short reference as JSONL",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_served(parser, _SHARED)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print. Raises ConfigError and ManyloraError."""
    config = served_config(arguments, _SHARED)
    adapter = find_adapter(arguments.adapter, config)
    replaced = find_adapter(arguments.replaces, config) if arguments.replaces else None
    from adapters.training.dataset import read_dataset
    from server.finetune.evaluation.evaluate import evaluate  # imports torch
    from server.finetune.evaluation.gate import decide
    from server.finetune.evaluation.table import table

    evaluation = evaluate(config, read_dataset(arguments.data), adapter, replaced, progress=True)
    decision = decide(evaluation)
    if arguments.answers is not None:
        _write_answers(arguments.answers, evaluation.answers)
    if arguments.json:
        gate = {"publish": decision.publish, "reason": decision.reason}
        print(json.dumps({**evaluation.as_json(), "gate": gate}, indent=2))
    else:
        print(f"{table(evaluation)}\n{decision.reason}")


def find_adapter(wanted: str, config: ServerConfig) -> Path:
    """The adapter ``wanted`` in the adapter folder, otherwise the folder at the path ``wanted``.

    Raises:
        AdapterNotFound: neither exists.
    """
    with suppress(AdapterNameInvalid):  # then it is a path
        named = resolve_under(config.adapters.folder, folder_name(wanted))
        if named.is_dir():
            return named
    if Path(wanted).is_dir():
        return Path(wanted)
    raise AdapterNotFound(
        f"{wanted!r:.200} is neither an adapter in {config.adapters.folder} nor a folder; give one of them."
    )


def _write_answers(path: Path, answers: Sequence[Answers]) -> None:
    lines = [{"line": one.line, "reference": one.reference} | dict(one.given) for one in answers]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
