"""The training methods: which adapter PEFT creates, and what AdaLoRA needs in addition."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.base.calls import unservable_linears
from adapters.errors import RecipeInvalid
from adapters.sites import BaseLayout
from adapters.training.export import names_for
from adapters.training.isolation import linears_in_training
from adapters.training.recipe import ADALORA_SURPLUS, ADAPTER, ALL_LINEAR, TrainConfig
from adapters.training.servable import target_sites

# AdaLoRA does not prune in the first steps, and trains with the final ranks in the last steps.
_UNTOUCHED, _FINAL = 0.1, 0.3


def add_adapter(model: Any, config: TrainConfig, steps: int, layout: BaseLayout) -> PeftModel:
    """``model`` with a new adapter. Only the adapter is trained.

    Args:
        steps: optimiser steps of the whole run.
        layout: the base's.

    Raises:
        RecipeInvalid: PEFT cannot adapt the target modules, or they cannot be served.
    """
    names = config.target_modules
    common = {
        "target_modules": _targets(model, names, layout),
        "lora_dropout": config.dropout,
        "task_type": "CAUSAL_LM",
    }
    made = _adalora(config, steps, common) if config.method == "adalora" else _lora(config, common)
    try:
        adapted = get_peft_model(model, made)
    except ValueError as error:  # PEFT finds no module, or a module that is not a linear
        raise RecipeInvalid(f"--target-modules {','.join(names)} cannot be used: {error}") from error
    if others := adapted.peft_config[
        ADAPTER
    ].target_parameters:  # PEFT turns the names of linears into those of experts with the same ones
        raise RecipeInvalid(
            f"--target-modules {','.join(names)} cannot be used: with these names, PEFT adapts experts "
            f"({', '.join(sorted(others))}), which cannot be served; name linears of the "
            "attention only."
        )
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):  # autocast casts already; a second cast would cost time
            module.cast_input_dtype_enabled = False
    return adapted


def _targets(model: Any, names: tuple[str, ...], layout: BaseLayout) -> list[str]:
    """The linears to adapt, as PEFT takes them. all-linear stands for those that can be served."""
    with linears_in_training(model):
        unservable = unservable_linears(model, layout.sites)
    if names == ALL_LINEAR:
        servable = layout.sites.keys() - unservable.keys()
        return names_for(servable & _left_alone(model, servable), layout.modules)
    for name in sorted(site.name for site in target_sites(names, layout)):
        if reason := unservable.get(name):
            raise RecipeInvalid(f"--target-modules: {name} cannot be served, because {reason}.")
    return list(names)


def _left_alone(model: Any, names: Collection[str]) -> set[str]:
    """The linears that PEFT does not take for experts of a sparse base because of their names."""
    config = LoraConfig(target_modules=sorted(names))
    convert_peft_config_for_transformers(config, model, None)
    return set(config.target_modules or ())


def _lora(config: TrainConfig, common: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        use_rslora=config.method == "rslora",
        use_dora=config.method == "dora",
        **common,
    )


def _adalora(config: TrainConfig, steps: int, common: dict[str, Any]) -> AdaLoraConfig:
    begin = round(config.r * ADALORA_SURPLUS) or 1
    return AdaLoraConfig(
        init_r=begin,
        target_r=config.r,
        lora_alpha=config.alpha * begin / config.r,  # PEFT divides by the initial rank
        tinit=int(steps * _UNTOUCHED),
        tfinal=int(steps * _FINAL),
        deltaT=max(1, steps // 100),
        total_step=steps,
        **common,
    )


class RankAllocation(TrainerCallback):  # type: ignore[misc]
    """Lets AdaLoRA reallocate its ranks after each optimiser step, before the gradients are cleared."""

    def on_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: Any, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def trained_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The exact state of training: the trained parameters and AdaLoRA's statistics."""
    state = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is not None:
        for kind in _STATISTICS:
            state |= {f"{kind}:{name}": value for name, value in getattr(allocator, kind).items()}
        pattern = model.peft_config[ADAPTER].rank_pattern or {}
        state |= {f"rank_pattern:{name}": torch.tensor(kept) for name, kept in pattern.items()}
    return {name: value.contiguous().cpu() for name, value in state.items()}


def restore_state(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Restore the result of ``trained_state``."""
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, Any]] = {kind: {} for kind in (*_STATISTICS, "rank_pattern")}
    with torch.no_grad():
        for name, value in state.items():
            kind, _, inner = name.partition(":")
            if kind in found:
                found[kind][inner] = value
            else:
                parameters[name].copy_(value)
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is not None:
        for kind in _STATISTICS:
            device = next(iter(parameters.values())).device
            setattr(allocator, kind, {name: value.to(device) for name, value in found[kind].items()})
        pattern = {name: kept.tolist() for name, kept in found["rank_pattern"].items()}
        model.peft_config[ADAPTER].rank_pattern = pattern or None


_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
