"""Converts our config to the arguments of transformers' Trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import TrainingArguments

from adapters.errors import RecipeInvalid
from adapters.training.gpu import optimizer_for
from adapters.training.recipe import TrainConfig


def training_arguments(
    config: TrainConfig, checkpoints: Path, device: str, steps: int, rate: float
) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        checkpoints: the output folder.
        device: ``cpu`` or ``cuda:N``.
        steps: optimiser steps of the whole run.
        rate: the peak learning rate.

    Raises:
        RecipeInvalid: DeepSpeed is requested but not installed.
    """
    on_cpu = device == "cpu"
    if config.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise RecipeInvalid("--deepspeed needs DeepSpeed, which is not installed; run: pip install deepspeed")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(steps * config.warmup),  # a ratio would be rounded up to one step of rate 0
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        optim=optimizer_for(device)[0],
        bf16=True,
        use_cpu=on_cpu,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # our callback decides
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to="none",
        deepspeed=str(config.deepspeed) if config.deepspeed else None,
        fsdp=config.fsdp or None,
        fsdp_config=str(config.fsdp_config) if config.fsdp_config else None,
    )
    if arguments.n_gpu > 1:  # one process uses one GPU; the Trainer would use all of them
        arguments._n_gpu = 1
    return arguments
