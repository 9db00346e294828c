"""``manylora train`` on the command line; nothing heavy is imported before it runs."""

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

if TYPE_CHECKING:
    # argparse's sub-parsers have no public type
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Train an adapter on exactly the 4-bit weights that are served, and put it where a running server finds it.

  manylora train --data train.jsonl --eval eval.jsonl --name acme-support

Rows: OpenAI chat, prompt/completion, Alpaca or ShareGPT, one JSON object a line. The loss is on the
assistant's tokens alone. The run folder keeps the metrics, the loss curve and the checkpoints; a run that was
stopped or killed goes on with --resume. Exit codes: 0 done (result.json says whether it was published), 1 it
failed, 2 wrong options or data, 130 stopped, with a checkpoint.
"""
_LIMITS = ("--max-lora-rank", "--max-lora-bytes", "--lora-extra-memory")
_SHARED = (
    *_LIMITS,
    "--home",
    "--base",
    "--quantization",
    "--head-quantization",
    "--allow-special-tokens",
    "--ignore-adapter-templates",
    "--device",
    "--adapter-dir",
)


def add_parser(commands: SubParsers) -> None:
    """Add the command ``train``."""
    parser = commands.add_parser(
        "train",
        help="train an adapter and publish it",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="rows to learn from")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="held-out rows, measured at the end")
    parser.add_argument("--name", required=True, help="what the adapter will be called")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where its folder appears (default: --adapter-dir)"
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: training/NAME-TIME under --home)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    parser.add_argument(
        "--require-improvement",
        action="store_true",
        help="publish only what is better on --eval than the base and the version it replaces",
    )
    parser.add_argument(
        "--job",
        metavar="ID",
        help="the fine-tuning job that asks for it (the server says so): it replaces jobs' results alone",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check data and options, which takes seconds; one JSON object on stdout",
    )
    add_served(parser.add_argument_group("base and folders, as for manylora serve"), _SHARED)
    add_train_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate, publish; the exit code. Raises ConfigError."""
    if arguments.require_improvement and arguments.eval is None:
        raise ConfigError("--require-improvement needs --eval: it is measured on held-out rows.")
    config = served_config(arguments, _SHARED)
    if arguments.check:
        with _no_garbage_collection():
            from server.finetune.command.check import run_check  # only now: it brings torch

            return run_check(arguments, config)
    from server.finetune.command.command import Command  # the same, and PEFT

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
