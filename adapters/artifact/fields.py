"""Classifies every field of PEFT's ``LoraConfig``: it decides the result, it is a label, or it must be
neutral.

A label causes a warning at most. A field that would change the result and cannot be served is refused by
name. A field that neither PEFT nor this table knows comes from another tool. PEFT ignores it, and so does
this file, with a warning. If the config is from a newer PEFT than this table, an unknown field is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterUnsupported

KNOWN_PEFT = (0, 21)
"""The newest PEFT release of which every field is listed below."""

DECIDES = {
    *("peft_type", "bias", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_dora", "lora_bias", "modules_to_save", "ensure_weight_tying"),
}

# Only training reads these, or they matter only with a field that is refused below. ``fan_in_fan_out`` is the
# layout of the base's weight, not of the adapter's. ``merge_weights`` is PEFT 0.2's.
LABELS = {
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("inference_mode", "runtime_config", "fan_in_fan_out", "merge_weights"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size"),
}

_ALORA = "aLoRA acts only after its invocation tokens, which is not served yet; train plain LoRA"

REFUSED = {
    "trainable_token_indices": "trained embedding rows would replace the shared base's; train without them",
    "layer_replication": "it changes the shared base's layers; train on the base as it is",
    "target_parameters": "LoRA on bare parameters (fused experts) is not served yet; target linear modules",
    "alora_invocation_tokens": _ALORA,
    "use_qalora": "QALoRA pools the input before lora_A; train with use_qalora=false",
    "use_bdlora": "BD-LoRA's block-diagonal factors are not served yet; train plain LoRA",
    "arrow_config": "Arrow's routing is not served yet; serve each expert as an adapter",
    "kasa_config": "KaSA truncates the base's own weights; train plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train plain LoRA",
    "velora_config": "VeLoRA is not served yet; train plain LoRA",
    "megatron_config": "Megatron's parallel layers name their tensors differently; export with plain PEFT",
}

# Fields of other tools and of early releases that change what is computed.
REFUSED_ELSEWHERE = {
    "enable_lora": "PEFT 0.2's fused layers adapt a part of a linear only; train again with a newer PEFT",
    "invocation_string": _ALORA,
    "alora_invocation_string": _ALORA,
    "use_mora": "MoRA's square matrices are not LoRA's pair; train plain LoRA",
}

_INITS_ON_BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_INITS_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


def check_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings, as whole sentences. Raises AdapterUnsupported for the first field that cannot be served."""
    _check_kind(config.get("peft_type"))
    for key, reason in {**REFUSED, **REFUSED_ELSEWHERE}.items():
        if _is_set(config.get(key)):
            raise AdapterUnsupported(f"{key} is set in adapter_config.json: {reason}.")
    _check_init(config.get("init_lora_weights"))
    return (*_task_warning(config.get("task_type")), *_unknown_warning(config))


def _check_kind(kind: Any) -> None:
    if kind is None:
        raise AdapterUnsupported(
            "adapter_config.json has no peft_type, which PEFT always writes; save the adapter with PEFT's "
            "save_pretrained."
        )
    if kind != "LORA":
        raise AdapterUnsupported(f"peft_type is {kind!r:.100}; only 'LORA' adapters can be served.")


def _check_init(init: Any) -> None:
    """Refuse initialisations that subtract from the base's weight: the pair alone is then not the change."""
    if init in _INITS_ON_BASE_KEPT:
        return
    if isinstance(init, str) and init.lower().startswith(_INITS_CONVERTIBLE):
        raise AdapterUnsupported(
            f"init_lora_weights is {init!r:.100}, which changed the base's weights in training; "
            "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if init == "loftq":
        raise AdapterUnsupported(
            "init_lora_weights is 'loftq', which replaced the base's weights in training; train with "
            "peft.replace_lora_weights_loftq instead, which leaves the base as it is."
        )
    raise AdapterUnsupported(
        f"init_lora_weights is {init!r:.100}, which may have changed the base's weights in "
        "training; train with init_lora_weights=true."
    )


def _task_warning(task: Any) -> tuple[str, ...]:
    if task in (None, "", "CAUSAL_LM"):
        return ()
    return (f"task_type is {task!r:.100}; it is served as an adapter of a causal language model.",)


def _unknown_warning(config: Mapping[str, Any]) -> tuple[str, ...]:
    known = DECIDES | LABELS | REFUSED.keys() | REFUSED_ELSEWHERE.keys()
    unknown = sorted(key for key in config.keys() - known if _is_set(config[key]))
    if unknown and _is_newer(config.get("peft_version")):
        raise AdapterUnsupported(
            f"{unknown[0]:.100} is set in adapter_config.json, which PEFT {config['peft_version']!s:.20} "
            "wrote; this server does not know what it means. Update the server, or remove the field if the "
            "adapter does not depend on it."
        )
    if not unknown:
        return ()
    shown = ", ".join(f"{key:.60}" for key in unknown[:5]) + (", …" if len(unknown) > 5 else "")
    return (f"adapter_config.json has fields that PEFT's LoRA does not have, and they are ignored: {shown}.",)


def _is_newer(version: Any) -> bool:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) > KNOWN_PEFT


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}
