"""Exports a trained model as a plain PEFT LoRA folder, for every method.

The folder's tensors are bf16, as in serving. If a pair's scale differs from the config's rule (``alpha /
rank``), it is folded into B. So AdaLoRA and pruned adapters become plain LoRA with a ``rank_pattern``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from adapters.artifact import WEIGHTS_FILE
from adapters.errors import TrainingDiverged
from adapters.training.recipe import ADAPTER


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One linear's update: ``scale * b @ a``, and with DoRA the magnitude of each output.

    Attributes:
        a: [rank, in_features], float32.
        b: [out_features, rank], float32.
        magnitude: [out_features], or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Nominal:
    """The settings in an adapter's config that hold for all its linears.

    Attributes:
        base_model: the base's name (``base_model_name_or_path``).
    """

    alpha: float
    use_rslora: bool
    use_dora: bool
    base_model: str

    def scale(self, rank: int) -> float:
        return self.alpha / math.sqrt(rank) if self.use_rslora else self.alpha / rank


@torch.no_grad()
def pairs_of(model: PeftModel) -> dict[str, Pair]:
    """The pair of each adapted linear, by its name in the base. Rows that AdaLoRA has pruned are left out."""
    pairs: dict[str, Pair] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, AdaLoraLayer):
            pair = _adalora_pair(module)
            if pair.rank:
                pairs[name] = pair
        elif isinstance(module, LoraLayer):
            pairs[name] = _lora_pair(module)
    return pairs


def _lora_pair(module: LoraLayer) -> Pair:
    magnitude = None
    if ADAPTER in module.lora_magnitude_vector:
        magnitude = _float(module.lora_magnitude_vector[ADAPTER].weight)
    a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    return Pair(_float(a), _float(b), float(module.scaling[ADAPTER]), magnitude)


def _adalora_pair(module: AdaLoraLayer) -> Pair:
    values = _float(module.lora_E[ADAPTER])
    kept = values[:, 0] != 0
    a = (_float(module.lora_A[ADAPTER]) * values)[kept]
    # PEFT adds the same small number in SVDLinear.forward.
    scale = module.scaling[ADAPTER] / (module.ranknum[ADAPTER].item() + 1e-5)
    return Pair(a, _float(module.lora_B[ADAPTER])[:, kept], scale)


def write_adapter(folder: Path, pairs: Mapping[str, Pair], nominal: Nominal, sites: Iterable[str]) -> int:
    """Write ``adapter_config.json`` and the tensors into ``folder``. Returns the size of the tensors in
    bytes.

    Args:
        sites: all linears of the base that an adapter may have, for short names in the config.

    Raises:
        TrainingDiverged: a weight is not finite, or all weights are untrained.
    """
    if not pairs:
        raise TrainingDiverged("The adapter has no rank row left; train with a larger --r or more steps.")
    ranks = {name: pair.rank for name, pair in pairs.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=usual,
        lora_alpha=nominal.alpha,
        use_rslora=nominal.use_rslora,
        use_dora=nominal.use_dora,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        target_modules=names_for(set(pairs), set(sites)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=nominal.base_model,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(_tensors(pairs, nominal), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return (folder / WEIGHTS_FILE).stat().st_size


def _tensors(pairs: Mapping[str, Pair], nominal: Nominal) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = _saved(pair.a, name)
        tensors[f"{key}.lora_B.weight"] = _saved(pair.b * (pair.scale / nominal.scale(pair.rank)), name)
        if pair.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = _saved(pair.magnitude, name)
    return tensors


def _saved(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise TrainingDiverged(f"The adapter's weights of {name} became NaN or infinite; nothing was saved.")
    return tensor.to(torch.bfloat16).contiguous()


def names_for(chosen: Collection[str], sites: Collection[str]) -> list[str]:
    """The endings of the chosen names if they select exactly these, else the full names."""
    endings = {name.rpartition(".")[2] for name in chosen}
    named = {site for site in sites if site.rpartition(".")[2] in endings}
    return sorted(endings) if named == set(chosen) else sorted(chosen)


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()
