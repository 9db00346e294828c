"""The fields of adapters, files and fine-tuning jobs."""

from __future__ import annotations

from server.http.fields.rule import NO_EFFECT, SERVED, Rules, neutral, refused

_SUPERVISED_ONLY = "only supervised fine-tuning is available, so send 'supervised'"

LOAD: Rules = {
    "lora_name": SERVED,
    "lora_path": SERVED,
    "load_inplace": SERVED,
    "base_model_name": SERVED,  # vLLM ignores it; here another base is refused
}
UNLOAD: Rules = {
    "lora_name": SERVED,
    "lora_int_id": NO_EFFECT,  # vLLM's own number of the adapter, which vLLM ignores too
}
FILE: Rules = {
    "file": SERVED,
    "purpose": SERVED,
    "expires_after": refused("files are stored until they are deleted, so leave it out"),
}
JOB: Rules = {
    "model": SERVED,
    "training_file": SERVED,
    "validation_file": SERVED,
    "method": SERVED,
    "hyperparameters": SERVED,
    "suffix": SERVED,
    "seed": SERVED,
    "metadata": SERVED,
    "name": SERVED,
    "adapter_method": SERVED,
    "r": SERVED,
    "alpha": SERVED,
    "dropout": SERVED,
    "target_modules": SERVED,
    "learning_rate": SERVED,
    "max_seq_len": SERVED,
    "max_steps": SERVED,
    "packing": SERVED,
    "prune_rank": SERVED,
    "require_improvement": SERVED,
    "integrations": neutral([], remedy="this server does not report jobs to other services, so leave it out"),
}
METHOD: Rules = {
    "type": SERVED,
    "supervised": SERVED,
    "dpo": refused(_SUPERVISED_ONLY),
    "reinforcement": refused(_SUPERVISED_ONLY),
}
SUPERVISED: Rules = {"hyperparameters": SERVED}
HYPERPARAMETERS: Rules = {
    "n_epochs": SERVED,
    "batch_size": SERVED,
    "learning_rate_multiplier": SERVED,
}
