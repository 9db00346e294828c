"""Replaces ``manylora train``. It has the same flags, run folder and publishing, but a ready-made adapter.

It publishes the folder ``trained``, which is beside the state folder, after one short step for each row.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from adapters.errors import AdapterError
from server.finetune.command.provenance import Producer, Provenance
from server.finetune.command.publish import publish

PROGRAM = (sys.executable, str(Path(__file__)))
STEP_SECONDS = 0.05


def end(run: Path, status: str, **fields: object) -> None:
    (run / ".result").write_text(json.dumps({"status": status, **fields}))
    (run / ".result").rename(run / "result.json")


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--data", "--output-dir", "--run-dir", "--home"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--name", "--job"):
        parser.add_argument(flag, required=True)
    options, _ = parser.parse_known_args()
    run: Path = options.run_dir
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = len(list(checkpoints.iterdir()))

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        end(run, "interrupted")
        sys.exit(130)

    signal.signal(signal.SIGTERM, stop)
    total = len(options.data.read_text().splitlines())
    with (run / "metrics.jsonl").open("a") as metrics:
        for step in range(done + 1, total + 1):
            time.sleep(STEP_SECONDS)
            line = {
                "event": "step",
                "time": time.time(),
                "step": step,
                "total_steps": total,
                "loss": 1 / step,
            }
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            (checkpoints / f"checkpoint-{step}").mkdir(exist_ok=True)
    by = Producer(Provenance(options.home), options.job)
    try:
        publish(options.home.parent / "trained", options.output_dir, options.name, by)
    except AdapterError as error:
        end(run, "failed", reason=str(error))
        return 1
    end(run, "published", metrics={"trained_tokens": 10})
    return 0


if __name__ == "__main__":
    sys.exit(main())
