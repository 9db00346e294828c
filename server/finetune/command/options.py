"""Every option of ``manylora train`` that is a field of ``TrainConfig``, declared once. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adapters.training.recipe import TrainConfig
from server.config.values import auto_or, choice, integer, size


@dataclass(frozen=True, slots=True)
class TrainOption:
    """One flag, one field of ``TrainConfig``, whose default it has.

    Attributes:
        parse: turns the text into the value; raises ``ValueError("must be …")``; None = a switch.
    """

    flag: str
    field: str
    parse: Callable[[str], Any] | None
    metavar: str | None
    help: str


def number(value: str) -> float:
    """Any number; ``TrainConfig`` knows the range."""
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number") from None


def names(value: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


_WHOLE = integer(0, 2**31 - 1)  # ``TrainConfig`` knows each range
_CHOICE = choice("auto", "on", "off")

# fmt: off
OPTIONS: dict[str, tuple[TrainOption, ...]] = {
    "adapter": (
        TrainOption("--method", "method", choice("lora", "rslora", "dora", "adalora"), "METHOD",
                    "lora, rslora, dora, or adalora (finds a rank for each module; served as plain LoRA)"),
        TrainOption("--r", "r", _WHOLE, "RANK", "rank; of adalora the mean that remains"),
        TrainOption("--alpha", "alpha", number, "A", "the output is scaled by A / RANK"),
        TrainOption("--dropout", "dropout", number, "P", "share of inputs dropped while training"),
        TrainOption("--target-modules", "target_modules", names, "NAMES",
                    "all-linear, or module names or their endings, with commas between them"),
        TrainOption("--prune-rank", "prune_rank", number, "RISE",
                    "then drop rank rows while the loss on --eval rises by no more than this"),
    ),
    "learning": (
        TrainOption("--epochs", "epochs", auto_or(number), "N",
                    "passes over the rows, may be a fraction; auto: 3, more for few rows, fewer for many"),
        TrainOption("--max-steps", "max_steps", _WHOLE, "N", "optimiser steps; 0: as many as --epochs takes"),
        TrainOption("--lr", "learning_rate", auto_or(number), "RATE",
                    "peak learning rate; auto: 1e-3 under 1B parameters, 2e-4 under 20B, else 1e-4"),
        TrainOption("--lr-multiplier", "lr_multiplier", number, "FACTOR", "of the peak learning rate"),
        TrainOption("--warmup", "warmup", number, "SHARE", "of the steps; then it falls along a cosine"),
        TrainOption("--weight-decay", "weight_decay", number, "W", "of AdamW"),
        TrainOption("--max-grad-norm", "max_grad_norm", number, "NORM", "gradients are scaled down to it"),
        TrainOption("--batch-size", "batch_size", _WHOLE, "N", "rows in one pass"),
        TrainOption("--accumulation", "accumulation", _WHOLE, "N", "passes in one optimiser step"),
        TrainOption("--max-seq-len", "max_seq_len", _WHOLE, "TOKENS", "longer rows are cut, and counted"),
        TrainOption("--packing", "packing", None, None,
                    "fill each place of a batch up to --max-seq-len; no row ever sees another"),
        TrainOption("--seed", "seed", _WHOLE, "N", "of weights, order and dropout"),
    ),
    "machine": (
        TrainOption("--threads", "threads", _WHOLE, "N", "CPU threads; 0: torch's choice"),
        TrainOption("--duty", "duty", number, "SHARE", "compute in at most this share of the time"),
        TrainOption("--gpu-memory", "gpu_memory", auto_or(size(1)), "SIZE",
                    "most memory of a GPU to take; auto: nine tenths of what is free when it begins"),
        TrainOption("--gradient-checkpointing", "gradient_checkpointing", _CHOICE, "{auto,on,off}",
                    "recompute activations instead of keeping them; auto: where memory is short"),
        TrainOption("--cache-dequantized", "cache_dequantized", _CHOICE, "{auto,on,off}",
                    "keep 4-bit weights unpacked while training; auto: on a CPU with the memory for it"),
        TrainOption("--checkpoint-steps", "checkpoint_steps", _WHOLE, "N",
                    "save every N steps; 0: after each epoch, and every two minutes"),
        TrainOption("--keep-checkpoints", "keep_checkpoints", _WHOLE, "N", "how many stay"),
        TrainOption("--deepspeed", "deepspeed", Path, "FILE", "DeepSpeed config, as transformers takes it"),
        TrainOption("--fsdp", "fsdp", str, "MODE", "as transformers takes it: 'full_shard auto_wrap', …"),
        TrainOption("--fsdp-config", "fsdp_config", Path, "FILE", "as transformers takes it"),
    ),
}
# fmt: on


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Declare them all, grouped."""
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
                    type=_typed(option.parse),
                    default=defaults[option.field],
                    metavar=option.metavar,
                    help=text,
                )


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``TrainConfig`` that these options set."""
    fields_ = (option.field for options in OPTIONS.values() for option in options)
    return {field: getattr(arguments, field) for field in fields_}


def _shown(default: Any) -> str:
    if default is None or default is False:
        return ""
    return f" (default: {','.join(default) if isinstance(default, tuple) else default})"


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` with errors that argparse shows as they are."""

    def typed(value: str) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{value!r} {error}") from None

    return typed
