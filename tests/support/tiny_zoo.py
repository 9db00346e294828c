"""A tiny random model of every causal LM class of transformers, as a folder that ``--base`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.tiny_configs import quiet, tiny_config
from tests.support.tiny_models import tiny_tokenizer

_STD = 0.1
"""Least standard deviation of a matrix. With transformers' 0.02 a tiny model's attention hardly matters."""


def tiny_model(model_type: str, seed: int = 0, **fields: Any) -> Any:
    """A random causal LM of that model type, bf16, in eval mode.

    Raises the error of transformers if the class cannot be built from its config.
    """
    config = tiny_config(model_type, **fields)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data = _roughened(parameter.data)
    return model.to(torch.bfloat16).eval()


def save_tiny_model(model_type: str, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """Write the model and a tokenizer of its vocabulary's size to ``folder``."""
    model = tiny_model(model_type, seed, **fields)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with quiet():
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def _roughened(values: torch.Tensor) -> torch.Tensor:
    """Give random values to all weights. New norms, gates and biases are ones and zeros and hide faults."""
    std = float(values.std()) if values.numel() > 1 else 0.0
    if values.dim() < 2 or std == 0.0:
        return values + torch.randn(values.shape) * _STD
    return values * max(1.0, _STD / std)
