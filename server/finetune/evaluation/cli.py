"""``manylora eval``: an adapter, published or not, beside the base on held-out rows."""

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

if TYPE_CHECKING:
    # argparse's sub-parsers have no public type
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

    from server.finetune.evaluation.result import Answers

_DESCRIPTION = """\
Measure an adapter beside the base on held-out rows, both in the same batches of the serving engine.

loss         mean negative log-likelihood of the assistant's tokens, encoded as in training
exact match  share of the rows with a short reference (at most 16 words) that the greedy answer equals but for
             white space around it
token F1     their mean word overlap, as SQuAD counts it
"""
_SHARED = (
    "--home",
    "--base",
    "--quantization",
    "--head-quantization",
    "--allow-special-tokens",
    "--device",
    "--adapter-dir",
    "--ignore-adapter-templates",
    "--kv-cache-memory",
    "--gpu-memory-utilization",
    "--threads",
)


def add_parser(commands: SubParsers) -> None:
    """Add the command ``eval``; nothing heavy is imported before it runs."""
    parser = commands.add_parser(
        "eval",
        help="measure an adapter on held-out rows",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="NAME|DIR",
        help="a name in the adapter folder, or any PEFT folder",
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="rows as manylora train takes"
    )
    parser.add_argument(
        "--replaces", metavar="NAME|DIR", help="measure a third: the version that the adapter would replace"
    )
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="write every short row's answers as JSONL"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    add_served(parser, _SHARED)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate and print. Raises ConfigError and ManyloraError."""
    config = served_config(arguments, _SHARED)
    adapter = find_adapter(arguments.adapter, config)
    replaced = find_adapter(arguments.replaces, config) if arguments.replaces else None
    from adapters.training.dataset import read_dataset
    from server.finetune.evaluation.evaluate import evaluate  # only now: it brings torch
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
    """The folder of that name in the adapter folder, or else the folder at that path.

    Raises:
        AdapterNotFound: there is neither.
    """
    with suppress(AdapterNameInvalid):  # then it can only be a path
        named = resolve_under(config.adapters.folder, folder_name(wanted))
        if named.is_dir():
            return named
    if Path(wanted).is_dir():
        return Path(wanted)
    raise AdapterNotFound(
        f"{wanted!r:.200} is neither an adapter in {config.adapters.folder} nor a folder; name one of them."
    )


def _write_answers(path: Path, answers: Sequence[Answers]) -> None:
    lines = [{"line": one.line, "reference": one.reference} | dict(one.given) for one in answers]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
