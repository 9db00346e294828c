"""Prints the errors of ``manylora train`` in its options and data."""

from __future__ import annotations

import sys

from adapters.errors import (
    AdapterNameInvalid,
    DatasetInvalid,
    ManyloraError,
    RecipeInvalid,
    RunFolderInvalid,
)

WRONG = 2
"""The exit code for wrong options or data."""
USER_ERRORS = (AdapterNameInvalid, DatasetInvalid, RecipeInvalid, RunFolderInvalid)
"""Errors that the user can correct in the options or the data."""


def report_error(error: ManyloraError) -> int:
    """Print one line for every bad row, then the error. Returns the exit code."""
    for problem in getattr(error, "problems", ()):
        say(f"line {problem.line} {problem.reason}")
    say(f"manylora train: {error.summary if isinstance(error, DatasetInvalid) else error}")
    return WRONG


def say(text: str) -> None:
    """Print on stderr, because stdout is for results."""
    print(text, file=sys.stderr)
