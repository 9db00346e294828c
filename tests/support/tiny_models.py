"""Tiny random models and adapters in the same files as real ones, so that tests need no network."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from adapters.base import LoadedBase

Family = Literal["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"]
FAMILIES: tuple[Family, ...] = get_args(Family)
TinyBase: TypeAlias = Callable[[Family], LoadedBase]
"""The type of the fixture ``tiny_base``: a family's tiny model in NF4, loaded once for each session."""

VOCAB_SIZE = 512
# A multiple of 64, as are all sizes below: NF4 quantises in blocks of 64.
_HIDDEN = 64
_WEIGHT_STD = 0.1
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 16},
    "gemma": {"head_dim": 32},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 32},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4},
    "deepseek_v2": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 3},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 96,
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "phi3": {
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}

_JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""Phi-3's linears that contain these of other families."""

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
PHI3: dict[str, Any] = {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}
"""Config fields of a Phi-3 that was trained for 32 tokens and then for longer sequences."""
GEMMA3: dict[str, Any] = {
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 500,
}
"""A config of several models, like Gemma 3's from 4B up."""


def make_tiny_model(family: str, path: Path, seed: int = 0, **config_fields: Any) -> Path:
    """Save a random model (2 or 3 layers, 4 heads on 2 KV heads) and its tokenizer.

    Args:
        family: transformers' model type; one of ``Family``, or another that reads the same fields.
        config_fields: fields that are added to its config or replace the usual ones.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": _HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": _WEIGHT_STD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**sizes, **_EXTRAS.get(family, {}), **config_fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _roughen(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def targets_of(family: str, names: list[str] | str) -> list[str] | str:
    """A family's names of these linears of Llama. A word such as "all-linear" stays as it is."""
    if family != "phi3" or isinstance(names, str):
        return names
    return sorted({_JOINED.get(name, name) for name in names})


def tiny_tokenizer() -> Any:
    """A byte-level BPE of 512 tokens with a chat template, learnt from invented words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=_SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    letters = random.Random(0)
    words = ("".join(letters.choices("aeiourstlnm", k=letters.randint(2, 7))) for _ in range(3000))
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    end, bos, eos = _SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=end)
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def make_peft_adapter(
    base: Path | str | Any,
    path: Path,
    r: int = 8,
    target_modules: list[str] | str = "all-linear",
    seed: int = 0,
    replaced_embedding: bool = False,
    save_embedding_layers: bool = False,
    **lora_config: Any,
) -> Path:
    """Save a random adapter with PEFT. Its effect on the logits is large.

    Args:
        base: the base's folder, or the model (4-bit or not), which is not changed.
        path: the adapter's folder.
        replaced_embedding: change the base's embedding too, and save it beside the adapter.
        save_embedding_layers: the option of PEFT's ``save_pretrained``.
        lora_config: more fields of ``peft.LoraConfig``; ``lora_alpha`` is ``2 * r`` unless given.
    """
    model = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, Path | str) else base
    fields = {"lora_alpha": 2 * r, "task_type": "CAUSAL_LM", **lora_config}
    adapted = get_peft_model(model, LoraConfig(r=r, target_modules=target_modules, **fields))
    generator = torch.Generator().manual_seed(seed)
    trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    if replaced_embedding:
        trained.append(("embed_tokens", adapted.get_input_embeddings().weight))
    before = [parameter.data for _, parameter in trained]
    for name, parameter in trained:
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("lora_B.default.bias"):
            parameter.data = noise.to(parameter) * 0.1
        elif "magnitude" in name or ".lora_" not in name:  # they start with the base's values
            size = 0.3 if "magnitude" in name or parameter.dim() == 1 else 0.03
            parameter.data = parameter.data + (noise * size).to(parameter)
        else:
            std = 0.05 if "_B" in name else parameter.shape[-1] ** -0.5
            parameter.data = (noise * std).to(parameter)
    # PEFT would otherwise ask the hub for the base's config.
    adapted.save_pretrained(path, save_embedding_layers=save_embedding_layers or replaced_embedding)
    for (_, parameter), data in zip(trained, before, strict=True):
        parameter.data = data
    adapted.unload()
    return path


def _roughen(model: Any) -> None:
    """Give random values to norms and biases. New ones are ones and zeros, which hide a missing operation."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape) * _WEIGHT_STD
