"""Options that other commands share with ``manylora serve``. Flags, variables and defaults are the same."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from server.config import ServerConfig, from_args
from server.config.options import OPTIONS, Option


def add_served(parser: argparse._ActionsContainer, flags: Sequence[str]) -> None:
    """Declare these options of the server on ``parser``. Their values stay text until ``served_config``."""
    for option in _named(flags):
        shown = "" if option.default is None else f" (default: {option.default})"
        if option.metavar is None:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help + shown)
        else:
            parser.add_argument(option.flag, metavar=option.metavar, help=option.help + shown)


def served_config(arguments: argparse.Namespace, flags: Sequence[str]) -> ServerConfig:
    """The server's config from these flags and from variables. Raises ConfigError."""
    typed = [(option.flag, getattr(arguments, option.dest)) for option in _named(flags)]
    return from_args([word for flag, value in typed for word in _words(flag, value)], os.environ)


def _words(flag: str, value: str | bool | None) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, value]


def _named(flags: Sequence[str]) -> list[Option]:
    return [option for option in OPTIONS if option.flag in flags]
