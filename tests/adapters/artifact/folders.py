"""Adapter folders for tests: small ones on two invented sites, and the layout of a real model for PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, Limits
from adapters.base.load import layout_of as base_layout
from adapters.sites import BaseLayout, Site

LIMITS = Limits(max_rank=64, max_bytes=10_000_000)
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
SITES = {Q: Site(Q, 8, 6), V: Site(V, 8, 4)}
MODULES = {
    "",
    "model",
    "model.embed_tokens",
    "model.layers",
    "model.layers.0",
    "model.layers.0.self_attn",
    "model.layers.0.norm",
    "lm_head",
}
LAYOUT = BaseLayout(
    SITES,
    frozenset(MODULES | SITES.keys()),
    "some-lab/Tiny-1B",
    embedding=Site("model.embed_tokens", 16, 8),
    head=Site("lm_head", 8, 16),
    norms={"model.layers.0.norm": {"weight": 8}},
    biases=frozenset({Q}),
)


def key(site: str, side: str) -> str:
    """The tensor's name, as PEFT writes it."""
    return f"base_model.model.{site}.lora_{side}.weight"


def tensors(rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random LoRA pairs for both sites of ``LAYOUT``."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, site in SITES.items():
        result[key(name, "A")] = torch.randn(rank, site.in_features, generator=generator)
        result[key(name, "B")] = torch.randn(site.out_features, rank, generator=generator)
    return result


def config(**fields: Any) -> dict[str, Any]:
    """A rank-4 config that targets both sites of ``LAYOUT``, with ``fields`` on top."""
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return {**base, "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny-1b", **fields}


def write_folder(
    folder: Path, settings: dict[str, Any] | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write both files of an adapter. An existing folder is overwritten in place."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config() if settings is None else settings))
    save_file(tensors() if weights is None else weights, folder / WEIGHTS_FILE)
    return folder


def tiny_llama() -> Any:
    """A Llama of two layers. Its sizes differ, so that a swapped shape fails."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def layout_of(model: Any) -> BaseLayout:
    """The layout that the base would report."""
    return base_layout(model, "some-lab/Tiny-Llama")
