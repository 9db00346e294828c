"""Checks an upload's rows in a process of its own, which keeps its memory and its computing from serving.

``python -m server.finetune.jobs.check FILE [reasoning]`` prints what it found as one JSON object; the word
says that the base's chat template takes reasoning.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from adapters.errors import DatasetUnreadable
from adapters.training.dataset import DatasetInvalid, LineProblem, read_dataset
from server.finetune.jobs.child import child_command

_NICE = 5  # a client waits for the answer: behind serving, but before training


@dataclass(frozen=True, slots=True)
class Checked:
    """A file whose rows can all be trained on.

    Attributes:
        format: the name of the kind of rows.
        unused_fields: fields that say nothing to the base, and in how many rows they are.
    """

    format: str
    rows: int
    unused_fields: dict[str, int] = field(default_factory=dict)


def check(path: Path, filename: str, takes_reasoning: bool = False) -> Checked:
    """Read the file whole. Raises DatasetInvalid, which calls it ``filename``.

    ``takes_reasoning``: whether the base's chat template does.
    """
    words = [str(path), "reasoning"] if takes_reasoning else [str(path)]
    command = child_command([sys.executable, "-m", __name__, *words], _NICE)
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["memory ran out, so give fewer rows"])[-1]
        raise DatasetUnreadable(filename, f"could not be checked: {reason}.")
    found = json.loads(done.stdout)
    if "unreadable" in found:
        raise DatasetUnreadable(filename, found["unreadable"])
    if "problems" in found:
        raise DatasetInvalid(filename, [LineProblem(*each) for each in found["problems"]], found["count"])
    return Checked(**found)


def _report(path: Path, takes_reasoning: bool) -> dict[str, object]:
    try:
        dataset = read_dataset(path)
    except DatasetUnreadable as error:
        return {"unreadable": error.reason}
    except DatasetInvalid as error:
        return {"problems": [astuple(problem) for problem in error.problems], "count": error.count}
    return asdict(Checked(dataset.format, len(dataset.rows), dataset.unused_by(takes_reasoning)))


if __name__ == "__main__":
    print(json.dumps(_report(Path(sys.argv[1]), "reasoning" in sys.argv[2:])))
