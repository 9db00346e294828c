"""The options of ``manylora train`` that are fields of ``TrainConfig``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adapters.training.recipe import TrainConfig
from server.config.values import argument, auto_or, choice, integer, size


@dataclass(frozen=True, slots=True)
class TrainOption:
    """One flag for one field of ``TrainConfig``. The field has the default.

    Attributes:
        parse: converts the text to the value, or raises ``ValueError("must be …")``; None = a switch.
    """

    flag: str
    field: str
    parse: Callable[[str], Any] | None
    metavar: str | None
    help: str


def number(value: str) -> float:
    """Any number. ``TrainConfig`` checks the range."""
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def names(value: str) -> tuple[str, ...]:
    """Words that are separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


_WHOLE = integer(0, 2**31 - 1)  # ``TrainConfig`` checks the range
_CHOICE = choice("auto", "on", "off")

# fmt: off
OPTIONS: dict[str, tuple[TrainOption, ...]] = {
    "adapter": (
        TrainOption("--method", "method", choice("lora", "rslora", "dora", "adalora"), "METHOD",
                    "lora, rslora, dora, or adalora (chooses a rank for each module; served as plain LoRA)"),
        TrainOption("--r", "r", _WHOLE, "RANK", "rank; with adalora, the mean rank at the end"),
        TrainOption("--alpha", "alpha", number, "A", "the output is scaled by A / RANK"),
        TrainOption("--dropout", "dropout", number, "P", "share of inputs that are dropped in training"),
        TrainOption("--target-modules", "target_modules", names, "NAMES",
                    "all-linear, or module names or their endings, separated by commas"),
        TrainOption("--prune-rank", "prune_rank", number, "RISE",
                    "at the end, remove rank rows while the loss on --eval rises by at most RISE"),
    ),
    "learning": (
        TrainOption("--epochs", "epochs", auto_or(number), "N",
                    "passes over the rows, also a fraction; auto: 3, more for few rows, fewer for many"),
        TrainOption("--max-steps", "max_steps", _WHOLE, "N", "optimiser steps; 0: as --epochs says"),
        TrainOption("--lr", "learning_rate", auto_or(number), "RATE",
                    "peak learning rate; auto: 1e-3 under 1B parameters, 2e-4 under 20B, else 1e-4"),
        TrainOption("--lr-multiplier", "lr_multiplier", number, "FACTOR", "factor of the peak learning rate"),
        TrainOption("--warmup", "warmup", number, "SHARE",
                    "share of steps in which the rate rises; then it falls along a cosine"),
        TrainOption("--weight-decay", "weight_decay", number, "W", "weight decay of AdamW"),
        TrainOption("--max-grad-norm", "max_grad_norm", number, "NORM",
                    "largest norm of gradients; larger ones are scaled down"),
        TrainOption("--batch-size", "batch_size", _WHOLE, "N", "rows in one forward pass"),
        TrainOption("--accumulation", "accumulation", _WHOLE, "N", "forward passes in one optimiser step"),
        TrainOption("--max-seq-len", "max_seq_len", _WHOLE, "TOKENS", "longer rows are cut and counted"),
        TrainOption("--packing", "packing", None, None,
                    "fill each sequence with rows up to --max-seq-len; rows do not see each other"),
        TrainOption("--seed", "seed", _WHOLE, "N", "random seed of weights, order and dropout"),
    ),
    "machine": (
        TrainOption("--threads", "threads", _WHOLE, "N", "CPU threads; 0: torch chooses"),
        TrainOption("--duty", "duty", number, "SHARE", "compute in at most this share of the time"),
        TrainOption("--gpu-memory", "gpu_memory", auto_or(size(1)), "SIZE",
                    "most GPU memory to use; auto: nine tenths of the memory that is free at the start"),
        TrainOption("--gradient-checkpointing", "gradient_checkpointing", _CHOICE, "{auto,on,off}",
                    "recompute activations instead of keeping them; auto: if memory is short"),
        TrainOption("--cache-dequantized", "cache_dequantized", _CHOICE, "{auto,on,off}",
                    "keep 4-bit weights unpacked in training; auto: on a CPU with enough memory"),
        TrainOption("--checkpoint-steps", "checkpoint_steps", _WHOLE, "N",
                    "save every N steps; 0: after each epoch and every two minutes"),
        TrainOption("--keep-checkpoints", "keep_checkpoints", _WHOLE, "N", "checkpoints to keep"),
        TrainOption("--deepspeed", "deepspeed", Path, "FILE", "DeepSpeed config of transformers"),
        TrainOption("--fsdp", "fsdp", str, "MODE", "FSDP mode of transformers: 'full_shard auto_wrap', …"),
        TrainOption("--fsdp-config", "fsdp_config", Path, "FILE", "FSDP config of transformers"),
    ),
}
# fmt: on


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Declare all options, in groups."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for heading, options in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for option in options:
            text = f"{option.help}{_shown(defaults[option.field])}".replace("%", "%%")
            if option.parse is None:
                group.add_argument(option.flag, dest=option.field, action="store_true", help=text)
            else:
                group.add_argument(
                    option.flag,
                    dest=option.field,
                    type=argument(option.parse),
                    default=defaults[option.field],
                    metavar=option.metavar,
                    help=text,
                )


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``TrainConfig`` and the values that the options have set."""
    fields_ = (option.field for options in OPTIONS.values() for option in options)
    return {field: getattr(arguments, field) for field in fields_}


def _shown(default: Any) -> str:
    if default is None or default is False:
        return ""
    return f" (default: {','.join(default) if isinstance(default, tuple) else default})"
