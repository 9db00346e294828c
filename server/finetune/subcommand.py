"""The command-line set-up that ``manylora train`` and ``manylora eval`` share. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # argparse's sub-parsers have no public type
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

BASE_OPTIONS = (
    "--home",
    "--base",
    "--quantization",
    "--head-quantization",
    "--hf-overrides",
    "--rope-scaling",
    "--allow-special-tokens",
    "--ignore-adapter-templates",
    "--device",
    "--adapter-dir",
)
"""The options of ``manylora serve`` that say which base is used, how, and where its adapters are."""


def add_subcommand(commands: SubParsers, name: str, help_: str, description: str) -> argparse.ArgumentParser:
    """The parser of a new subcommand, which shows ``description`` with its line breaks."""
    return commands.add_parser(
        name,
        help=help_,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
