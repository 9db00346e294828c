"""A run folder can resume only the run that it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import RunFolderInvalid
from adapters.training import RunFolder


def test_a_newer_option_counts_as_off_in_an_older_run(tmp_path: Path) -> None:
    """A run that an earlier version of the program began can be resumed."""
    run = RunFolder(tmp_path / "run", True, True)
    run.check_same_run({"r": 4, "prune_rank": None}, ())
    run.check_same_run({"r": 4, "prune_rank": None, "allow_special_tokens": False}, ())
    for other in ({"allow_special_tokens": True}, {"prune_rank": 0.0}, {"r": 8}):
        with pytest.raises(RunFolderInvalid, match=f"another {next(iter(other))}"):
            run.check_same_run({"r": 4, "prune_rank": None} | other, ())
    run.close()
