"""Choices by the machine's resources: the device, and options that trade memory for speed, with reasons.

``gpu`` has what concerns only GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adapters.base.experts import nf4_experts
from adapters.base.memory import free_memory
from adapters.base.unpack import four_bit_linears
from adapters.errors import RecipeInvalid
from adapters.training.gpu import free_gpu_memory
from adapters.training.recipe import Choice, TrainConfig

# The share of the free memory for each of the two options. The rest is for other processes.
_SHARE = 0.25
# On a GPU there is one option, within the run's memory limit. The rest is for the head's logits.
_SHARE_OF_GPU = 0.5
# What a decoder block stores of one token for its backward pass, in multiples of its sizes (counted on Llama,
# in bf16, with float32 copies inside norms and activations).
_KEPT_OF_HIDDEN, _KEPT_OF_INTERMEDIATE = 48, 16


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and its reason, as a sentence."""

    on: bool
    reason: str


def choose_device(wanted: str, local_rank: int) -> str:
    """``cpu`` or ``cuda:N``. Raises RecipeInvalid if CUDA is requested but not available."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RecipeInvalid("--device cuda: torch finds no CUDA device here; use --device cpu.")
    return f"cuda:{local_rank}" if available and wanted != "cpu" else "cpu"


def decide_unpacking(model: Any, config: TrainConfig, device: str) -> Decision:
    """Whether to keep the 4-bit weights unpacked in bf16 during the run."""
    linears, experts = four_bit_linears(model), nf4_experts(model)
    if not linears and not experts:
        return Decision(False, "The base is not quantised, so nothing is unpacked.")
    need = 2 * sum(module.in_features * module.out_features for module in linears.values())
    need += 2 * sum(module.num_weights for module in experts.values())
    if config.cache_dequantized != "auto":
        return _as_asked("--cache-dequantized", config.cache_dequantized)
    if device != "cpu":
        return Decision(False, "Weights stay in 4 bits: a GPU unpacks them as fast as it reads them.")
    free = free_memory()
    fits = need <= _SHARE * free
    how = "are kept unpacked in bf16 (same numbers, faster)" if fits else "are unpacked again in each pass"
    return Decision(fits, f"4-bit weights {how}: {_mib(need)} of {_mib(free)} free.")


def decide_recomputing(model: Any, config: TrainConfig, device: str, tokens: int) -> Decision:
    """Whether to recompute activations in the backward pass (gradient checkpointing).

    Args:
        tokens: tokens of the largest batch.
    """
    if config.gradient_checkpointing != "auto":
        return _as_asked("--gradient-checkpointing", config.gradient_checkpointing)
    text = model.config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    per_layer = _KEPT_OF_HIDDEN * text.hidden_size + _KEPT_OF_INTERMEDIATE * inner
    need = tokens * text.num_hidden_layers * per_layer
    share, free = (_SHARE, free_memory()) if device == "cpu" else (_SHARE_OF_GPU, free_gpu_memory(device))
    if need <= share * free:
        return Decision(
            False,
            "Activations are kept, because recomputing them would take a third more time: "
            f"about {_mib(need)} of {_mib(free)} free.",
        )
    return Decision(
        True, f"Activations are recomputed: keeping them would take about {_mib(need)} of {_mib(free)} free."
    )


def _as_asked(flag: str, choice: Choice) -> Decision:
    return Decision(choice == "on", f"{flag} is {choice}.")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
