"""Which bases passed the check on this machine, kept beside the prepared bases. A file for each base.

A file that is damaged or of another format counts as none.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("manylora.engine")

_KEPT = 16
"""Verdicts kept of one base. An older one is dropped."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A base passed.

    Attributes:
        facts: what the result depends on: versions, device, options.
        model: the name of the model that was checked, see ``StepModel``.
        deviation: in standard deviations of the logits.
    """

    facts: Mapping[str, str]
    model: str
    deviation: float


class Verdicts:
    """The verdicts of one base.

    Args:
        home: the folder of all state.
        digest: the prepared base's.
    """

    def __init__(self, home: Path, digest: str) -> None:
        self._path = home.expanduser() / "bases" / f"{digest}.checked.json"

    def find(self, facts: Mapping[str, str]) -> list[Verdict]:
        """The verdicts with exactly these facts, one for each model."""
        return [verdict for verdict in self.all() if verdict.facts == facts]

    def add(self, verdict: Verdict) -> None:
        """Keep it. If the folder cannot be written, the check runs again at the next start."""
        others = [one for one in self.all() if (one.facts, one.model) != (verdict.facts, verdict.model)]
        rows = [
            {"facts": dict(one.facts), "model": one.model, "deviation": one.deviation}
            for one in [*others, verdict][-_KEPT:]
        ]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                file = Path(folder) / "verdicts"
                file.write_text(json.dumps(rows, indent=1))
                os.replace(file, self._path)
        except OSError as error:
            log.warning("the result of the check cannot be kept in %s (%s)", self._path, error)

    def all(self) -> list[Verdict]:
        """Every verdict that is kept."""
        try:
            rows = json.loads(self._path.read_text("utf-8"))
            return [_verdict(row) for row in rows]
        except (OSError, ValueError, TypeError, LookupError):
            return []


def _verdict(row: object) -> Verdict:
    """Raises TypeError, ValueError or LookupError if ``row`` is none."""
    if not isinstance(row, dict) or not isinstance(row["facts"], dict):
        raise TypeError("not a verdict")
    return Verdict(row["facts"], str(row["model"]), float(row["deviation"]))
