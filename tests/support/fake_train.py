"""Replaces ``manylora train``. It has the same flags and run folder, and follows orders in the data.

The first row's question has the orders: ``steps=5 sleep=0.02 every=2 die=3 wait=3 fail kept crash stubborn``.
With ``wait=3`` the first attempt waits for a signal after step 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from adapters.paths import folder_name
from server.finetune.command.provenance import Provenance

COMMAND = (sys.executable, "-m", "tests.support.fake_train")
"""The value for ``server.finetune.jobs.command.PROGRAM``."""


def main() -> int:
    options = read_options()
    run: Path = options.run_dir
    orders = read_orders(options.data)
    if options.check:
        return check(orders)
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    first = not any(checkpoints.iterdir())
    done = max((int(path.name.rpartition("-")[2]) for path in checkpoints.iterdir()), default=0)
    with (run / "metrics.jsonl").open("a") as metrics:

        def add_event(event: str, **fields: Any) -> None:
            metrics.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            metrics.flush()

        def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
            (checkpoints / f"checkpoint-{step}").mkdir(exist_ok=True)
            end(run, "interrupted")
            sys.exit(130)

        step, total = done, int(orders.get("steps", 3))
        if "stubborn" in orders:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, stop)
        if "warn" in orders:
            add_event("warning", message="2 rows are one.")
        add_event("start", total_steps=total)
        while step < total:
            time.sleep(float(orders.get("sleep", 0)))
            now = step + 1
            add_event(
                "step",
                step=now,
                total_steps=total,
                loss=1 / now,
                epoch=now / total,
                eta_seconds=total - now,
            )
            step = now  # not earlier, because a signal must not skip a step that was not reported
            if orders.get("die") == str(step):
                os.kill(os.getpid(), signal.SIGKILL)
            if step % int(orders.get("every", 1)) == 0:
                (checkpoints / f"checkpoint-{step}").mkdir(exist_ok=True)
                figures = {"loss": 1 / step, "accuracy": 0.25, "eval_loss": 0.5, "eval_accuracy": 0.75}
                add_event("checkpoint", step=step, path=str(checkpoints / f"checkpoint-{step}"), **figures)
            if first and orders.get("wait") == str(step):
                signal.pause()
        add_event("eval", step=step, total_steps=total, loss=0.5, accuracy=0.75)
        if options.eval:
            add_event("evaluated", message="It is better.", exact_match=1.0, base_exact_match=0.0)
    return finish(options, orders)


def check(orders: dict[str, str]) -> int:
    error = orders.get("refused", "").replace("_", " ") or None
    print(json.dumps({"error": error, "warnings": ["2 rows are one."] if "warn" in orders else []}))
    return 2 if error else int(orders.get("broken", 0))


def finish(options: argparse.Namespace, orders: dict[str, str]) -> int:
    evaluation = {"adapter": {"exact_match": 1.0}} if options.eval else None
    if "crash" in orders:
        print("manylora train: it broke", file=sys.stderr)
        return 1
    if "fail" in orders:
        return (
            end(options.run_dir, "failed", reason="There is no memory left.", error_type="OutOfMemory") or 1
        )
    if "kept" in orders:
        return end(options.run_dir, "kept", reason="It is no better than the base.", evaluation=evaluation)
    folder: Path = options.output_dir / folder_name(options.name)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "adapter_config.json").write_text(json.dumps(vars(options), default=str))
    Provenance(options.home).mark(partial, options.name, options.job)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    metrics = {"trained_tokens": 123, "train_loss": 0.5}
    return end(options.run_dir, "published", metrics=metrics, evaluation=evaluation)


def end(run: Path, status: str, **fields: Any) -> int:
    (run / ".result").write_text(json.dumps({"status": status, **fields}))
    (run / ".result").rename(run / "result.json")
    return 0


def read_orders(data: Path) -> dict[str, str]:
    first = json.loads(data.read_text().splitlines()[0])
    words = first["messages"][0]["content"].split()
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in ("--data", "--eval", "--output-dir", "--run-dir", "--home"):
        parser.add_argument(flag, type=Path)
    for flag in (
        "--name",
        "--job",
        "--base",
        "--quantization",
        "--head-quantization",
        "--hf-overrides",
        "--device",
        "--seed",
        "--threads",
        "--duty",
        "--method",
    ):
        parser.add_argument(flag)
    for flag in ("--max-lora-rank", "--max-lora-bytes", "--lora-extra-memory"):
        parser.add_argument(flag)
    for flag in ("--r", "--epochs", "--lr", "--target-modules", "--prune-rank"):
        parser.add_argument(flag)
    for flag in ("--resume", "--packing", "--require-improvement", "--check"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
