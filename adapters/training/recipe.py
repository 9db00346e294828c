"""All options of a training run as one frozen, validated config. Pure Python."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adapters.errors import RecipeInvalid

Method = Literal["lora", "rslora", "dora", "adalora"]
Quantization = Literal["nf4", "none"]
Choice = Literal["auto", "on", "off"]
Device = Literal["auto", "cpu", "cuda"]

ALL_LINEAR = ("all-linear",)
ADAPTER = "default"
"""PEFT's name for a model's first adapter."""
ADALORA_SURPLUS = 1.5
"""AdaLoRA (https://arxiv.org/abs/2303.10512, section 4) starts with 1.5 times the final rank."""

# These decide how a run is executed, not what it computes. A resumed run may change them.
EXECUTION = ("home", "threads", "duty", "gpu_memory", "keep_checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The options of a training run.

    Attributes:
        data: the training rows (see ``dataset``).
        eval_data: held-out rows for the loss after each epoch; None = no evaluation.
        base: as ``manylora serve --base``.
        hf_overrides: fields that replace those of the config of the base, as a JSON object; empty: none.
        home: the folder of the 4-bit base; the same as the server's, so both use the same file.
        allow_special_tokens: special tokens in messages count as such; otherwise they are text.
        device: auto = CUDA if there is one.
        target_modules: ``("all-linear",)``, or module names or their endings.
        method: LoRA, rank-stabilised LoRA, DoRA, or AdaLoRA.
        r: rank; with AdaLoRA the final mean rank.
        alpha: the adapter's output is scaled by alpha / r (rsLoRA: alpha / sqrt(r)).
        prune_rank: after training, drop rank rows while the held-out loss rises by no more than this.
        epochs: passes over the rows; may be a fraction; None = by their number (``schedule.epochs_for``).
        max_steps: optimiser steps; 0 = the steps of ``epochs``.
        learning_rate: the peak rate; None = by the base's size (``learning_rate_for``).
        lr_multiplier: the factor of that rate.
        warmup: share of the steps in which the rate rises; then it falls along a cosine.
        batch_size: rows (with ``packing``: packs) in one pass.
        accumulation: passes in one optimiser step.
        max_seq_len: tokens of the longest example; longer ones are cut and counted.
        packing: fill each element of a batch with examples up to ``max_seq_len``; no example attends to
            another.
        max_grad_norm: gradients are clipped to this norm.
        checkpoint_steps: steps between checkpoints; 0 = after each epoch.
        keep_checkpoints: how many are kept; older ones are removed.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        cache_dequantized: keep the 4-bit weights unpacked in bf16 while training (same values, faster).
        threads: CPU threads; 0 = torch's choice.
        gpu_memory: bytes of a GPU that the run may use; None = nine tenths of what is free at the start.
        duty: the largest share of time to compute in; the rest is left to others on the machine.
        deepspeed: path of a DeepSpeed config, passed to transformers.
        fsdp: passed to transformers (``full_shard auto_wrap``, …), with ``fsdp_config``, a path.
    """

    data: Path
    eval_data: Path | None = None
    base: str = "smollm2-135m"
    home: Path = Path(".manylora")
    quantization: Quantization = "nf4"
    head_quantization: Quantization = "none"
    hf_overrides: str = ""
    allow_special_tokens: bool = False
    device: Device = "auto"
    target_modules: tuple[str, ...] = ALL_LINEAR
    method: Method = "lora"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    prune_rank: float | None = None
    epochs: float | None = None
    max_steps: int = 0
    learning_rate: float | None = None
    lr_multiplier: float = 1.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    max_seq_len: int = 2048
    packing: bool = False
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    gradient_checkpointing: Choice = "auto"
    cache_dequantized: Choice = "auto"
    threads: int = 0
    gpu_memory: int | None = None
    duty: float = 1.0
    deepspeed: Path | None = None
    fsdp: str | None = None
    fsdp_config: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RecipeInvalid(f"{_flag(name)} must be from {low:g} to {high:g}, not {value:g}.")
        for name, choices in _CHOICES.items():
            if (chosen := getattr(self, name)) not in choices:
                raise RecipeInvalid(f"{_flag(name)} must be one of {', '.join(choices)}, not {chosen!r:.60}.")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise RecipeInvalid(f"--lr must be over 0 and at most 1, not {self.learning_rate:g}.")
        if not self.target_modules:
            raise RecipeInvalid("--target-modules must name a module, or be all-linear.")
        self._check_together()

    def _check_together(self) -> None:
        if self.prune_rank is not None and self.prune_rank < 0:
            raise RecipeInvalid(f"--prune-rank must be 0 or more, not {self.prune_rank:g}.")
        if self.prune_rank is not None and self.eval_data is None:
            raise RecipeInvalid("--prune-rank needs --eval: it measures how far the held-out loss rises.")
        if self.deepspeed is not None and self.fsdp is not None:
            raise RecipeInvalid("--deepspeed and --fsdp exclude each other; give one of them.")
        if self.fsdp_config is not None and self.fsdp is None:
            raise RecipeInvalid("--fsdp-config needs --fsdp.")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]


def learning_rate_for(parameters: int) -> float:
    """The QLoRA paper's rates (table 9): 2e-4 up to 13B parameters, 1e-4 above.

    Small bases use higher rates.
    """
    if parameters < 1_000_000_000:
        return 1e-3
    return 2e-4 if parameters < 20_000_000_000 else 1e-4


_CHOICES = {
    "method": get_args(Method),
    "quantization": get_args(Quantization),
    "head_quantization": get_args(Quantization),
    "device": get_args(Device),
    "gradient_checkpointing": get_args(Choice),
    "cache_dequantized": get_args(Choice),
}
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("r", 1, 4096),
    ("alpha", 1e-3, 1e6),
    ("dropout", 0, 0.9),
    ("epochs", 1e-3, 10_000),
    ("max_steps", 0, 10**9),
    ("lr_multiplier", 1e-3, 1000),
    ("warmup", 0, 1),
    ("weight_decay", 0, 1),
    ("batch_size", 1, 4096),
    ("accumulation", 1, 4096),
    ("max_seq_len", 8, 1 << 20),
    ("max_grad_norm", 1e-6, 1e6),
    ("seed", 0, 2**31 - 1),
    ("checkpoint_steps", 0, 10**9),
    ("keep_checkpoints", 1, 1000),
    ("threads", 0, 4096),
    ("duty", 0.01, 1),
)
_FLAGS = {"eval_data": "--eval", "learning_rate": "--lr"}


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
