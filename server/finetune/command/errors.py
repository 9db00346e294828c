"""How ``manylora train`` says what is wrong with what it was asked for."""

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
"""The exit code."""
ASKED_WRONGLY = (AdapterNameInvalid, DatasetInvalid, RecipeInvalid, RunFolderInvalid)


def tell(error: ManyloraError) -> int:
    """Every bad row on a line of its own, once, then the error; the exit code."""
    for problem in getattr(error, "problems", ()):
        say(f"line {problem.line} {problem.reason}")
    say(f"manylora train: {error.summary if isinstance(error, DatasetInvalid) else error}")
    return WRONG


def say(text: str) -> None:
    """To people."""
    print(text, file=sys.stderr)
