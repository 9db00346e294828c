"""``manylora train`` on the command line. Heavy modules are imported only when it runs."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import ConfigError
from server.config.shared_options import add_served, served_config
from server.finetune.command.options import add_train_options
from server.finetune.subcommand import BASE_OPTIONS, add_subcommand

if TYPE_CHECKING:
    from server.finetune.subcommand import SubParsers

_DESCRIPTION = """\
Train an adapter on exactly the 4-bit weights that are served, and publish it to the adapter folder, where a
running server finds it.

  manylora train --data train.jsonl --eval eval.jsonl --name acme-support

Rows: OpenAI chat, prompt/completion, Alpaca or ShareGPT, one JSON object a line. The loss is on the
assistant's tokens only. The run folder keeps the metrics, the loss curve and the checkpoints. --resume
continues a run that was stopped or killed. Exit codes: 0 done (result.json says whether the adapter was
published), 1 failed, 2 wrong options or data, 130 stopped with a checkpoint.
"""
_SHARED = (
    *BASE_OPTIONS,
    "--max-model-len",
    "--max-lora-rank",
    "--max-lora-bytes",
    "--lora-extra-memory",
)


def add_parser(commands: SubParsers) -> None:
    """Add the command ``train``."""
    parser = add_subcommand(commands, "train", "train an adapter and publish it", _DESCRIPTION)
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="training rows")
    parser.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="held-out rows; the adapter is evaluated on them",
    )
    parser.add_argument("--name", required=True, help="the adapter's name")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder to publish in (default: --adapter-dir)",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: training/NAME-TIME under --home)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint, if there is one"
    )
    parser.add_argument(
        "--require-improvement",
        action="store_true",
        help="publish only if better on --eval than the base and the version that it replaces",
    )
    parser.add_argument(
        "--job",
        metavar="ID",
        help="the fine-tuning job that trains (set by the server); it replaces only adapters of jobs",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check data and options, which takes seconds; prints one JSON object",
    )
    add_served(parser.add_argument_group("base and folders, as for manylora serve"), _SHARED)
    add_train_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate and publish. Returns the exit code. Raises ConfigError."""
    if arguments.require_improvement and arguments.eval is None:
        raise ConfigError("--require-improvement needs --eval, because it is measured on held-out rows.")
    config = served_config(arguments, _SHARED)
    if arguments.check:
        with _no_garbage_collection():
            from server.finetune.command.check import run_check  # imports torch

            return run_check(arguments, config)
    from server.finetune.command.command import Command  # imports torch and PEFT

    return Command(arguments, config).run()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Skip the cyclic garbage collector, also at the end of the process.

    It takes a third of a check's processor time, because importing the libraries makes many objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
