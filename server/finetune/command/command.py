"""The steps of ``manylora train``: train, evaluate, publish, and write ``result.json`` at every end."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.errors import RecipeInvalid
from adapters.paths import folder_name
from adapters.training import RunFolder, Stop, TrainConfig, train
from adapters.training.dataset import read_dataset
from adapters.training.gpu import release_memory
from adapters.training.progress import LineTimer
from adapters.training.run import Trained
from adapters.training.run_folder import EventKind
from adapters.training.stop import on_signals
from server.config import ServerConfig
from server.finetune.command.config import check_adapter_name, serving_of, train_config
from server.finetune.command.errors import USER_ERRORS, report_error, say
from server.finetune.command.provenance import Producer, Provenance
from server.finetune.command.publish import publish
from server.finetune.evaluation.evaluate import evaluate_adapter
from server.finetune.evaluation.examiner import Tick
from server.finetune.evaluation.gate import decide
from server.finetune.evaluation.table import table

DONE, STOPPED = 0, 130
_ENDED = ("published", "kept")


class Command:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace, server: ServerConfig) -> None:
        self._arguments, self._server = arguments, server
        self._output_dir: Path = arguments.output_dir or server.adapters.folder
        self._is_main = int(os.environ.get("RANK", "0")) == 0

    def run(self) -> int:
        """Run the command. Returns the exit code."""
        stop = Stop()
        try:
            with on_signals(stop):
                return self._run(stop)
        except USER_ERRORS as error:
            return report_error(error)
        except KeyboardInterrupt:
            return STOPPED

    def _run(self, stop: Stop) -> int:
        check_adapter_name(self._arguments, self._server)
        config = train_config(self._arguments, self._server)
        run = RunFolder(self._run_dir(), self._arguments.resume, self._is_main)
        try:
            known = run.read("result.json")
            if known is not None and known["status"] in _ENDED:
                say(f"This run has already ended: {known['status']}, {known['path']}.")
                return DONE
            (run.path / "result.json").unlink(missing_ok=True)
            return self._train(config, run, stop)
        except KeyboardInterrupt:
            self._end(run, "interrupted", reason="The run was interrupted.")
            raise
        except Exception as error:
            self._end(run, "failed", reason=str(error), error_type=type(error).__name__)
            raise
        finally:
            run.close()

    def _train(self, config: TrainConfig, run: RunFolder, stop: Stop) -> int:
        trained = train(config, run, stop, show=self._is_main, serving=serving_of(self._server))
        if not self._is_main:
            return DONE
        if trained.folder is None:
            last = run.last_checkpoint()
            self._end(run, "interrupted", trained, reason=f"The last checkpoint is {last}.")
            say(f"Stopped. The last checkpoint is {last}. Continue with --resume --run-dir {run.path}.")
            return STOPPED
        release_memory()  # of the trained model; the evaluation loads another
        evaluation, better, reason = self._evaluate(config, run, trained.folder)
        if self._arguments.require_improvement and not better:
            self._end(run, "kept", trained, path=trained.folder, reason=reason, evaluation=evaluation)
            say(f"The adapter was not published. It is in {trained.folder}. {reason}")
            return DONE
        path = self._publish(trained.folder)
        self._end(run, "published", trained, path=path, evaluation=evaluation)
        say(f"Published {path}.")
        return DONE

    def _publish(self, folder: Path) -> Path:
        name, job = self._arguments.name, self._arguments.job
        by = Producer(Provenance(self._server.home), job) if job is not None else None
        return publish(folder, self._output_dir, name, by)

    def _evaluate(
        self, config: TrainConfig, run: RunFolder, folder: Path
    ) -> tuple[dict[str, Any] | None, bool, str | None]:
        """Evaluate through the serving engine. Returns the figures, whether to publish, and the reason."""
        if config.eval_data is None:
            return None, True, None
        data = read_dataset(config.eval_data)
        replaced = self._output_dir / folder_name(self._arguments.name)
        self._report(run, "evaluating", f"Evaluating {len(data.rows)} rows through the serving engine.")
        evaluation = evaluate_adapter(
            config.base,
            config.home,
            config.quantization,
            config.device,
            data,
            folder,
            replaced if replaced.is_dir() else None,
            config.threads or None,
            progress=sys.stderr.isatty(),
            head_quantization=config.head_quantization,
            hf_overrides=config.hf_overrides,
            allow_special_tokens=config.allow_special_tokens,
            ignore_adapter_templates=self._server.adapters.ignore_templates,
            tick=self._ticking(run),
        )
        decision = decide(evaluation)
        run.event("evaluated", message=decision.reason, **evaluation.figures())
        say(f"{table(evaluation)}\n{decision.reason}")
        return evaluation.as_json(), decision.publish, decision.reason

    def _ticking(self, run: RunFolder) -> Tick:
        """A function that reports the progress of the evaluation from time to time."""
        timer = LineTimer()

        def tick(done: int, total: int) -> None:
            if timer.is_due():
                self._report(run, "evaluating", f"Evaluating: {done} of {total} requests are done.")

        return tick

    def _report(self, run: RunFolder, kind: EventKind, message: str) -> None:
        """Add an event to the run. Print it on stderr if there is no progress bar."""
        run.event(kind, message=message)
        if not sys.stderr.isatty():
            say(message)

    def _run_dir(self) -> Path:
        """The run folder: --run-dir, or the latest of that name to resume, or a new one."""
        if self._arguments.run_dir is not None:
            return Path(self._arguments.run_dir)
        if "WORLD_SIZE" in os.environ:
            raise RecipeInvalid("Several processes that train together need --run-dir to share one folder.")
        root, name = self._server.home / "training", folder_name(self._arguments.name)
        if self._arguments.resume and (earlier := sorted(root.glob(f"{name}-*Z"))):
            return earlier[-1]
        return root / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"

    def _end(self, run: RunFolder, status: str, trained: Trained | None = None, **fields: Any) -> None:
        result = {
            "status": status,
            "adapter": self._arguments.name if status == "published" else None,
            "path": None,
            "reason": None,
            "error_type": None,
            "metrics": trained.metrics if trained else {},
            "evaluation": None,
        }
        try:
            run.write("result.json", result | fields)
        except OSError as error:  # for example a full disk; the exit code still shows the result
            say(f"result.json cannot be written ({error.strerror}).")
