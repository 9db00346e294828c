"""``manylora bench quality`` trains every sample with ``manylora train``, then evaluates it in the engine.

Each task of ``adapters/samples`` is trained in a separate process on its training rows. Then base and adapter
are evaluated on its held-out rows. All printed figures are measured in this run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.samples.recipes import RECIPES, data_of
from server.finetune.evaluation.errors import EvaluationFailed

if TYPE_CHECKING:
    from server.finetune.evaluation.result import Evaluation
    from server.finetune.subcommand import SubParsers

_HEADINGS = (
    *("task", "rows trained", "rows held out", "exact match base", "adapter", "token F1 base", "adapter"),
    *("loss base", "adapter", "training, s", "tokens/s"),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """The figures of one task.

    Attributes:
        metrics: the metrics of the training command (``result.json``).
        seconds: wall-clock time of the whole command.
    """

    task: str
    metrics: dict[str, Any]
    seconds: float
    evaluation: Evaluation

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all epochs, divided by the seconds of training."""
        return float(self.metrics["tokens"] * self.metrics["epochs"] / self.metrics["seconds"])

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "options": RECIPES[self.task],
            "training": self.metrics,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "evaluation": self.evaluation.as_json(),
        }


def add_parser(kinds: SubParsers) -> None:
    """Add the kind ``quality`` to ``manylora bench``."""
    quality = kinds.add_parser("quality", help="train the samples and evaluate them", description=__doc__)
    quality.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(RECIPES)} (default: all)")
    quality.add_argument(
        "--home", type=Path, default=Path(".manylora"), metavar="DIR", help="(default: %(default)s)"
    )
    quality.add_argument("--output-dir", type=Path, metavar="DIR", help="keep the adapters in DIR")
    quality.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each CPU)")
    quality.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    quality.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train and evaluate one task after the other, and print the table."""
    unknown = sorted(set(arguments.tasks) - RECIPES.keys())
    if unknown:
        raise EvaluationFailed(f"There is no sample {unknown[0]!r}; choose from {', '.join(RECIPES)}.")
    with tempfile.TemporaryDirectory() as scratch:
        kept = arguments.output_dir or Path(scratch) / "adapters"
        proofs = [
            prove(task, arguments.home, kept, Path(scratch) / task, arguments.threads)
            for task in arguments.tasks or RECIPES
        ]
    print(markdown(proofs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([proof.as_json() for proof in proofs], indent=2) + "\n")
    return 0


def prove(task: str, home: Path, output_dir: Path, run_dir: Path, threads: int | None = None) -> Proof:
    """Train ``task`` into ``output_dir`` and evaluate the adapter.

    Raises:
        EvaluationFailed: the training command failed. Its message is on stderr.
    """
    from adapters.training.dataset import read_dataset
    from server.finetune.evaluation.evaluate import evaluate_adapter  # imports torch

    training, held_out = data_of(task)
    words = [
        "--data",
        training,
        "--name",
        task,
        "--home",
        home,
        "--output-dir",
        output_dir,
        "--run-dir",
        run_dir,
    ]
    words += [] if threads is None else ["--threads", threads]
    began = time.monotonic()
    command = [sys.executable, "-m", "server.cli", "train", *map(str, words), *RECIPES[task]]
    if subprocess.run(command, check=False).returncode:
        raise EvaluationFailed(f"Training {task} failed; its message is above.")
    seconds = time.monotonic() - began
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    rows = read_dataset(held_out)
    evaluation = evaluate_adapter(
        "smollm2-135m", home, "nf4", "auto", rows, output_dir / task, threads=threads, progress=True
    )
    return Proof(task, result["metrics"], seconds, evaluation)


def markdown(proofs: Iterable[Proof]) -> str:
    """The figures as a Markdown table."""
    rows: list[Sequence[str]] = [_HEADINGS, ["---", *["---:"] * (len(_HEADINGS) - 1)]]
    rows += [_cells(proof) for proof in proofs]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(proof: Proof) -> Sequence[str]:
    found = proof.evaluation
    return [
        proof.task,
        str(proof.metrics["rows"]),
        str(found.rows),
        *(_share(scores.exact_match) for scores in (found.base, found.adapter)),
        *(_share(scores.token_f1) for scores in (found.base, found.adapter)),
        *(f"{scores.loss:.2f}" for scores in (found.base, found.adapter)),
        f"{proof.seconds:.0f}",
        f"{proof.tokens_per_second:.0f}",
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
