"""What a LoRA config may say that cannot be served exactly, key by key, with the reason.

Every key of a config is understood (``config.py``), harmless at inference, or refused. Any other key is
refused by its name as soon as it says anything, for ignoring it could mean serving something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterUnsupported

UNDERSTOOD = {
    *("peft_type", "task_type", "base_model_name_or_path", "fan_in_fan_out", "bias", "init_lora_weights"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_dora", "lora_bias", "modules_to_save", "ensure_weight_tying"),
}

# Only training reads these, or only together with a key that is refused below.
HARMLESS = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config"),
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size"),
}

REFUSED = {
    "trainable_token_indices": "trained embedding rows would replace the shared base's; train without them",
    "layer_replication": "it changes the shared base's layers; train on the base as it is",
    "target_parameters": "LoRA on bare parameters (fused experts) is not served yet; target linear modules",
    "alora_invocation_tokens": "aLoRA acts only behind its invocation tokens, which is not served yet",
    "use_qalora": "QALoRA pools the input before lora_A; train with use_qalora=false",
    "use_bdlora": "BD-LoRA's block-diagonal factors are not served yet; train plain LoRA",
    "arrow_config": "Arrow's routing between adapters is not served yet; serve the experts singly",
    "kasa_config": "KaSA truncates the base's own weights; train plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train plain LoRA",
    "velora_config": "VeLoRA is not served yet; train plain LoRA",
    "megatron_config": "Megatron's parallel layers name their tensors otherwise; export with plain PEFT",
}

_INITS_ON_BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_INITS_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")


def check_supported(config: Mapping[str, Any]) -> None:
    """Raises AdapterUnsupported for the first thing in ``config`` that cannot be served exactly."""
    if config.get("peft_type") != "LORA":
        raise AdapterUnsupported(
            f"peft_type is {config.get('peft_type')!r:.100}; only 'LORA' adapters can be served."
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterUnsupported(
            f"task_type is {config['task_type']!r:.100}; only 'CAUSAL_LM' adapters can be served."
        )
    for key, reason in REFUSED.items():
        if _says_something(config.get(key)):
            raise AdapterUnsupported(f"{key} is set: {reason}.")
    _check_init(config.get("init_lora_weights"))
    _check_unknown(config)


def _check_init(init: Any) -> None:
    """Some initialisations take weight out of the base, so that the pair alone is not the change."""
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
        f"init_lora_weights is {init!r:.100}, which is not known to leave the base as it is."
    )


def _check_unknown(config: Mapping[str, Any]) -> None:
    for key in sorted(config.keys() - UNDERSTOOD - HARMLESS - REFUSED.keys()):
        if _says_something(config[key]):
            raise AdapterUnsupported(
                f"{key:.100} is set in adapter_config.json, but this server does not know what it means; "
                "update the server, or remove the field if the adapter does not depend on it."
            )


def _says_something(value: Any) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}
