"""Makes synthetic adapters: PEFT folders with random weights on every linear inside a base's blocks.

They cost as much as real adapters and have little effect. Only its functions import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.sites import Site

if TYPE_CHECKING:
    import torch

    from adapters.base import PreparedBase

# Small enough that the model still answers in text, large enough that adapters give different answers.
_B_STD = 1e-3


def write_adapters(base: PreparedBase, out: Path, count: int, rank: int, seed: int) -> dict[str, Path]:
    """Write ``count`` adapters of rank ``rank`` for ``base``. Only the base's config is read.

    Returns:
        name → folder (``out/lora-0000``, …), in order.
    """
    sites = sites_of(base.path)
    folders = {f"lora-{index:04d}": out / f"lora-{index:04d}" for index in range(count)}
    for index, folder in enumerate(folders.values()):
        save_adapter(folder, random_tensors(sites, rank, seed + index), sites, rank, base.source)
    return folders


def sites_of(base: Path) -> list[Site]:
    """Every linear inside the blocks. Loads no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapters.base import find_sites

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return list(find_sites(model).values())


def save_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], sites: Sequence[Site], rank: int, base: str
) -> None:
    """Write a PEFT folder. ``tensors`` have PEFT's names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({site.name.rpartition(".")[2] for site in sites}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def random_tensors(sites: Sequence[Site], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """bf16 A [rank, in] and B [out, rank] for every site, by PEFT's names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
        b = torch.randn(site.out_features, rank, generator=generator) * _B_STD
        tensors[f"base_model.model.{site.name}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"base_model.model.{site.name}.lora_B.weight"] = b.to(torch.bfloat16)
    return tensors
