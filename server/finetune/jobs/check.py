"""Checks the rows of an upload in a separate process, so that its memory and its work do not affect serving.

``python -m server.finetune.jobs.check FILE [reasoning]`` prints the result as one JSON object. ``reasoning``
means that the base's chat template reads reasoning.
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

_NICE = 5  # below serving, but above training, because a client waits for the answer


@dataclass(frozen=True, slots=True)
class Checked:
    """The result for a file whose rows can all be used.

    Attributes:
        format: the format of the rows.
        unused_fields: the number of rows that have the field, for each field that training does not use.
    """

    format: str
    rows: int
    unused_fields: dict[str, int] = field(default_factory=dict)


def check(path: Path, filename: str, takes_reasoning: bool = False) -> Checked:
    """Read and check the whole file.

    Args:
        filename: the client's name of the file, used in errors.
        takes_reasoning: whether the base's chat template reads reasoning.

    Raises:
        DatasetInvalid: there are rows that cannot be used.
        DatasetUnreadable: the file is not a data set, or the check could not run.
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
