"""Makes the command line that trains a job, and the environment of its process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from server.config import ServerConfig, TrainingConfig
from server.finetune.jobs.database import Job
from server.finetune.jobs.files import Files

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "server.cli", "train")

_HYPERPARAMETERS = {
    "n_epochs": "--epochs",
    "batch_size": "--batch-size",
    "learning_rate_multiplier": "--lr-multiplier",
}
_RECIPE = {
    "adapter_method": "--method",
    "r": "--r",
    "alpha": "--alpha",
    "dropout": "--dropout",
    "learning_rate": "--lr",
    "max_seq_len": "--max-seq-len",
    "max_steps": "--max-steps",
    "packing": "--packing",
    "prune_rank": "--prune-rank",
    "require_improvement": "--require-improvement",
    "target_modules": "--target-modules",
}
FIELDS = {flag: name for name, flag in _RECIPE.items()} | {
    flag: f"hyperparameters.{name}" for name, flag in _HYPERPARAMETERS.items()
}
"""The field of a job for each flag of the command."""


def train_command(job: Job, run_folder: Path, files: Files, config: ServerConfig) -> list[str]:
    """The command that trains ``job`` in ``run_folder``, or resumes it there."""
    arguments: dict[str, object] = {
        "--data": files.path(job.training_file),
        "--eval": files.path(job.validation_file) if job.validation_file else None,
        "--name": job.fine_tuned_model,
        "--job": job.id,
        "--output-dir": config.adapters.folder,
        "--run-dir": run_folder,
        "--base": config.model.name,
        "--quantization": config.model.quantization,
        "--head-quantization": config.model.head_quantization,
        "--hf-overrides": config.model.overrides or None,
        "--allow-special-tokens": config.model.allow_special_tokens,
        "--ignore-adapter-templates": config.adapters.ignore_templates,
        "--device": "cpu" if config.training.gpu == "none" else config.model.device,
        "--gpu-memory": config.training.gpu_memory,
        "--max-model-len": config.engine.max_model_len,
        "--max-lora-rank": config.adapters.max_lora_rank,
        "--max-lora-bytes": config.adapters.max_bytes,
        "--lora-extra-memory": config.adapters.extra_memory,
        "--home": config.home,
        "--seed": job.seed,
        "--threads": config.training.threads,
        "--duty": 1 - config.training.idle_share,
        "--resume": True,
    }
    arguments |= {flag: job.hyperparameters.get(name) for name, flag in _HYPERPARAMETERS.items()}
    arguments |= {flag: job.recipe.get(name) for name, flag in _RECIPE.items()}
    return [*PROGRAM, *(word for flag, value in arguments.items() for word in _words(flag, value))]


def train_environ(config: TrainingConfig) -> dict[str, str]:
    """The environment of this process without the variables of manylora, which may contain keys.

    The OpenMP threads of a job sleep while they wait. If they spun, they would take time from serving.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    if config.gpu != "auto":
        own["CUDA_VISIBLE_DEVICES"] = "" if config.gpu == "none" else config.gpu
    return own | {"OMP_WAIT_POLICY": "PASSIVE"}


def _words(flag: str, value: object) -> list[str]:
    if value is None or value is False or value == "auto":
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        value = ",".join(value)
    # One word, so that a value that begins with a dash is not read as a flag.
    return [f"{flag}={value:.12g}" if isinstance(value, float) else f"{flag}={value}"]
