"""Folders as training tools write them. Each is served as PEFT serves it, or refused with a clear message.

The fields are those that the tools' releases write. The installed PEFT makes the tensors. It also loads every
folder that is served, and the results must be equal.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from adapters.base.weights import BaseWeights
from adapters.errors import AdapterError
from tests.adapters.artifact.folders import LIMITS, layout_of, tiny_llama
from tests.support.tiny_models import make_peft_adapter

Tensors = dict[str, Tensor]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model.model.layers"

# The fields that each release of PEFT added to adapter_config.json, with their defaults.
ADDED: dict[str, dict[str, Any]] = {
    "0.2": {
        **{"base_model_name_or_path": "decapoda-research/tiny-llama", "bias": "none", "enable_lora": None},
        **{"fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05},
        **{"merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 8},
        **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    },
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "revision": None, "layers_pattern": None, "layers_to_transform": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}},
    "0.8": {"megatron_config": None, "megatron_core": "megatron.core", "use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {
        **{"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False},
        **{"peft_version": "0.18.1"},
    },
    "0.19": {"use_bdlora": None, "lora_ga_config": None, "peft_version": "0.19.1"},
    "0.21": {
        **{"velora_config": None, "monteclora_config": None, "kasa_config": None},
        **{"peft_version": "0.21.2"},
    },
}
_GONE_SINCE = {"0.4": ("enable_lora", "merge_weights")}


def as_peft_writes(version: str, **fields: Any) -> dict[str, Any]:
    """The whole config of that release, with the user's ``fields``."""
    config: dict[str, Any] = {}
    for release, added in ADDED.items():
        config |= added
        for gone in _GONE_SINCE.get(release, ()):
            del config[gone]
        if release == version:
            return config | fields
    raise ValueError(version)


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _last_layer(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}


def _without(*modules: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not any(module in name for module in modules)
    }


def _attention(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "self_attn" in name}


def _half_precision(tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def _named(before: str, after: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(before, after): tensor for name, tensor in tensors.items()}


def _with(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(*shape)}


@dataclass(frozen=True)
class Folder:
    """The files that a tool writes.

    Attributes:
        config: the whole of adapter_config.json.
        made: the fields with which PEFT makes the tensors.
        tensors: changes PEFT's tensors to those of the tool.
        says: a part of each warning, or of the refusal.
        by_peft: whether PEFT reads the tensors under these names.
    """

    config: dict[str, Any]
    made: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = _same
    says: tuple[str, ...] = ()
    by_peft: bool = True


_VERSIONS = {f"PEFT {version}": Folder(as_peft_writes(version)) for version in ADDED}
_LINEARS = {"target_modules": ALL}
_ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
SERVED: dict[str, Folder] = _VERSIONS | {
    "alpaca-lora": Folder(as_peft_writes("0.2", **_ATTENTION), _ATTENTION),
    "Chinese-LLaMA-Alpaca": Folder(
        as_peft_writes("0.3", lora_alpha=128.0, modules_to_save=["embed_tokens", "lm_head"]),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "KoAlpaca": Folder(as_peft_writes("0.3", target_modules=["q_proj", "v_proj", "query_key_value", "xxx"])),
    "LLaMA-Factory": Folder(
        as_peft_writes("0.15", target_modules=sorted(ALL), lora_dropout=0.0, inference_mode=True), _LINEARS
    ),
    "LLaMA-Factory, rsLoRA and additional_target": Folder(
        as_peft_writes("0.15", use_rslora=True, modules_to_save=["lm_head", "embed_tokens"]),
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "LLaMA-Factory, LoRA+ and DoRA": Folder(
        as_peft_writes("0.17", use_dora=True, **_LINEARS), {"use_dora": True, **_LINEARS}
    ),
    "Axolotl": Folder(as_peft_writes("0.17", r=32, **_LINEARS), {"r": 32, "lora_alpha": 16, **_LINEARS}),
    "Axolotl, lora_layers_to_transform": Folder(
        as_peft_writes("0.14", layers_to_transform=[1]), {"layers_to_transform": [1]}
    ),
    "Axolotl, FSDP": Folder(
        as_peft_writes("0.17"), tensors=_named(".layers.1.", ".layers.1._fsdp_wrapped_module."), by_peft=False
    ),
    "Axolotl, torch.compile": Folder(
        as_peft_writes("0.17"),
        tensors=_named("model.model.", "model._orig_mod.model."),
        by_peft=False,
    ),
    "Unsloth": Folder(
        as_peft_writes(
            "0.18",
            target_modules=ALL,
            lora_dropout=0,
            base_model_name_or_path="unsloth/tiny-llama-unsloth-bnb-4bit",
            auto_mapping={
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
        ),
        _LINEARS,
    ),
    "Unsloth, a regex": Folder(
        as_peft_writes(
            "0.18",
            target_modules=r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
            r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))",
        )
    ),
    "Unsloth, embedding and head": Folder(
        as_peft_writes("0.18", modules_to_save=["lm_head", "embed_tokens"]),
        {"modules_to_save": ["lm_head", "embed_tokens"], "save_embedding_layers": True},
    ),
    "Unsloth, layers that share keys and values": Folder(
        as_peft_writes("0.18", target_modules=ALL),
        _LINEARS,
        _without("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"),
        ("2 of the modules that target_modules selects have no tensors and stay as in the base",),
    ),
    "TRL": Folder(as_peft_writes("0.18", target_modules="all-linear", lora_dropout=0.1), _LINEARS),
    "TRL, no task_type": Folder(as_peft_writes("0.18", task_type=None)),
    "transformers' add_adapter": Folder(as_peft_writes("0.15", task_type=None, inference_mode=False)),
    "torchtune": Folder(
        {
            **{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"},
            **{"base_model_name_or_path": "meta/tiny-llama"},
        }
    ),
    "Tinker": Folder(
        as_peft_writes("0.18", target_modules="all-linear", lora_alpha=32, r=8),
        {**_LINEARS, "lora_alpha": 32},
        _attention,
        ("6 of the modules that target_modules selects have no tensors",),
    ),
    "ms-swift": Folder(
        as_peft_writes("0.14", lora_dtype=None, lorap_lr_ratio=None, lorap_emb_lr=1e-6, use_qa_lora=False),
        says=("fields that PEFT's LoRA does not have, and they are ignored: lorap_emb_lr.",),
    ),
    "a converter from mlx-lm, of the last layers": Folder(
        {
            **{"fine_tune_type": "lora", "num_layers": 1, "task_type": "CAUSAL_LM", "peft_type": "LORA"},
            **{"lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}},
            **{"r": 8, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "model": "mlx/tiny-4bit"},
        },
        tensors=_last_layer,
        says=(
            "they are ignored: fine_tune_type, lora_parameters, model, num_layers.",
            "2 of the modules that target_modules selects have no tensors and stay as in the base",
        ),
    ),
    "task_type of a sequence-to-sequence model": Folder(
        as_peft_writes("0.4", task_type="SEQ_2_SEQ_LM"), says=("task_type is 'SEQ_2_SEQ_LM'; it is",)
    ),
    "a reward model's without its head": Folder(
        as_peft_writes("0.10", task_type="SEQ_CLS", modules_to_save=["classifier", "score"]),
        says=("task_type is 'SEQ_CLS'", "modules_to_save names classifier, score, which the base does not"),
    ),
    "saved in bfloat16": Folder(as_peft_writes("0.17", peft_version="0.17.0"), tensors=_half_precision),
    "names with the adapter's": Folder(
        as_peft_writes("0.10"), tensors=_named(".weight", ".default.weight"), by_peft=False
    ),
    "names without PEFT's prefix": Folder(
        as_peft_writes("0.10"), tensors=_named("base_model.model.", ""), by_peft=False
    ),
}

REFUSED: dict[str, Folder] = {
    "PEFT 0.2's fused layers": Folder(
        as_peft_writes("0.2", enable_lora=[True, False, True]), says=("enable_lora is set .* fused layers",)
    ),
    "a PEFT of the future": Folder(
        as_peft_writes("0.21", peft_version="0.30.0", hyper_lora={"depth": 2}),
        says=(r"hyper_lora is set in adapter_config.json, which PEFT 0.30.0 wrote; .* Update the server",),
    ),
    "AdaLoRA": Folder(
        as_peft_writes("0.10", peft_type="ADALORA"), says=("peft_type is 'ADALORA'; only 'LORA'",)
    ),
    "prompt tuning": Folder({"peft_type": "PROMPT_TUNING"}, says=("peft_type is 'PROMPT_TUNING'",)),
    "LLaMA-Factory, PiSSA not converted": Folder(
        as_peft_writes("0.15", init_lora_weights="pissa_niter_16"),
        says=("init_lora_weights is 'pissa_niter_16', .* path_initial_model_for_weight_conversion",),
    ),
    "LLaMA-Factory, a resized vocabulary": Folder(
        as_peft_writes("0.15", modules_to_save=["embed_tokens", "lm_head"]),
        tensors=lambda tensors: {
            **tensors,
            "base_model.model.lm_head.weight": torch.ones(66, 32),
            "base_model.model.model.embed_tokens.weight": torch.ones(66, 32),
        },
        says=("is for a vocabulary of 66 tokens, but the base has 64: the vocabulary was resized",),
    ),
    "TRL's reward model": Folder(
        as_peft_writes("0.10", task_type="SEQ_CLS", modules_to_save=["classifier", "score"]),
        tensors=_with("base_model.model.score.weight", 1, 32),
        says=("'base_model.model.score.weight' cannot be served: .* head of a classifier or a reward model",),
    ),
    "TRL, trained rows of new tokens": Folder(
        as_peft_writes("0.17", trainable_token_indices=[62, 63]), says=("trainable_token_indices is set",)
    ),
    "Unsloth, fused experts": Folder(
        as_peft_writes("0.18", target_parameters=["mlp.experts.gate_up_proj"]),
        says=("target_parameters is set",),
    ),
    "aLoRA": Folder(
        as_peft_writes("0.18", alora_invocation_tokens=[1, 2]), says=("alora_invocation_tokens is set",)
    ),
    "DeepSpeed ZeRO-3, not gathered": Folder(
        as_peft_writes("0.10"),
        tensors=lambda tensors: dict.fromkeys(tensors, torch.ones(0)),
        says=("has shape .0., so it is empty or a shard: DeepSpeed",),
    ),
    "FSDP, flat": Folder(
        as_peft_writes("0.10"),
        tensors=lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
        says=(r"has shape \[256\], so it is empty or a shard: .* or FSDP",),
    ),
    "another base": Folder(
        as_peft_writes("0.10"),
        tensors=lambda tensors: {
            name.replace("model.layers", "transformer.h").replace("self_attn.q_proj", "attn.c_attn"): tensor
            for name, tensor in tensors.items()
            if "q_proj" in name
        },
        says=("matches no module of the base .*; the adapter seems to be for another base",),
    ),
    "a vision model's language half": Folder(
        as_peft_writes("0.18"),
        tensors=_named(".model.layers.", ".model.language_model.layers."),
        says=("matches no module of the base .*; the nearest are model.layers",),
    ),
    "mlx-lm": Folder(
        {
            **{"adapter_path": "adapters", "batch_size": 4, "fine_tune_type": "lora", "num_layers": 16},
            **{"lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "model": "mlx/tiny-4bit"},
        },
        says=("is an mlx-lm adapter .* Convert it to a PEFT folder",),
    ),
    "a converter from PEFT to mlx": Folder(
        {
            **{"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 2.0}},
            **{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        },
        tensors=lambda tensors: {
            name.removeprefix("base_model.model.")
            .replace("A.weight", "a")
            .replace("B.weight", "b"): tensor.t()
            for name, tensor in tensors.items()
        },
        says=("belongs to mlx-lm, which stores its pairs transposed",),
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def _write(folder: Folder, model: Any, path: Path) -> Path:
    made = {"r": 8, "target_modules": ["q_proj", "v_proj"], **folder.made}
    make_peft_adapter(model, path, **made)
    weights = folder.tensors(load_file(path / WEIGHTS_FILE))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / WEIGHTS_FILE)
    (path / CONFIG_FILE).write_text(json.dumps(folder.config, indent=2))
    for beside in ("README.md", "training_args.bin", "pytorch_model.bin", "tokenizer_config.json"):
        (path / beside).write_bytes(b"{}")
    return path


def _logits(model: Any) -> Tensor:
    """Of a fixed prompt."""
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(1, 20)[None]).logits
        return logits


def _put_in(model: Any, path: Path) -> tuple[Any, tuple[str, ...]]:
    """A copy of the model with the adapter as it is served, and the warnings."""
    changed, layout = copy.deepcopy(model), layout_of(model)
    adapter = load_adapter(path, layout, LIMITS, torch.float32, base=BaseWeights(model, layout))
    for name, pair in adapter.weights.items():
        weight = changed.get_submodule(name).weight.data
        adjustment = adapter.extras.adjustments.get(name)
        if adjustment is not None and adjustment.scale is not None:
            weight *= adjustment.scale[:, None]
        weight += (pair.a.t() @ pair.b).t()
    for end, module in (
        (adapter.extras.embedding, changed.model.embed_tokens),
        (adapter.extras.head, changed.lm_head),
    ):
        if end is not None and end.matrix is not None:
            module.weight = torch.nn.Parameter(end.matrix)
    return changed, adapter.info.warnings


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tool", SERVED)
def test_served_as_peft_serves_it(tool: str, model: Any, tmp_path: Path) -> None:
    folder = SERVED[tool]
    path = _write(folder, model, tmp_path / "a")
    served, warned = _put_in(model, path)
    said = [warning for warning in warned if not warning.startswith("It was trained on")]
    assert len(said) == len(folder.says)
    assert all(words in warning for words, warning in zip(folder.says, said, strict=True))
    if not folder.by_peft:  # PEFT ignores such names and computes the base
        path = make_peft_adapter(model, tmp_path / "plain", 8, ["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
    assert not torch.allclose(_logits(served), _logits(model), atol=1e-2)
    torch.testing.assert_close(_logits(served), _logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tool", REFUSED)
def test_refused_with_the_right_words(tool: str, model: Any, tmp_path: Path) -> None:
    folder = REFUSED[tool]
    path = _write(folder, model, tmp_path / "a")
    with pytest.raises(AdapterError, match=folder.says[0]):
        load_adapter(path, layout_of(model), LIMITS, torch.float32)
