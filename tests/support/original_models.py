"""Tiny random models as those with code of their own were published: their configs, names and layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny_models import VOCAB_SIZE, tiny_tokenizer

QWEN: dict[str, Any] = {  # of Qwen-7B, smaller
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLM",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "hidden_size": 64,
    "intermediate_size": 256,
    "initializer_range": 0.02,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 256,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": VOCAB_SIZE,
}
BAICHUAN: dict[str, Any] = {  # of Baichuan2-7B, smaller
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "tokenizer_class": "BaichuanTokenizer",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "model_max_length": 128,
    "model_type": "baichuan",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
    "z_loss_weight": 0,
}
CHATGLM: dict[str, Any] = {  # of ChatGLM3-6B, smaller
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 128,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "kv_channels": 32,
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": VOCAB_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.30.2",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB_SIZE, 64),
        "transformer.ln_f.weight": (64,),
        "lm_head.weight": (VOCAB_SIZE, 64),
        "transformer.rotary_emb.inv_freq": (8,),
    }
    for n in range(2):
        p = f"transformer.h.{n}."
        shapes |= {p + "ln_1.weight": (64,), p + "ln_2.weight": (64,)}
        shapes |= {p + "attn.c_attn.weight": (192, 64), p + "attn.c_attn.bias": (192,)}
        shapes |= {p + "attn.c_proj.weight": (64, 64), p + "mlp.c_proj.weight": (64, 128)}
        shapes |= {p + "mlp.w1.weight": (128, 64), p + "mlp.w2.weight": (128, 64)}
    return shapes


def baichuan_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (VOCAB_SIZE, 64),
    }
    for n in range(2):
        p = f"model.layers.{n}."
        shapes |= {p + "input_layernorm.weight": (64,), p + "post_attention_layernorm.weight": (64,)}
        shapes |= {p + "self_attn.W_pack.weight": (192, 64), p + "self_attn.o_proj.weight": (64, 64)}
        shapes |= {p + "mlp.gate_proj.weight": (128, 64), p + "mlp.up_proj.weight": (128, 64)}
        shapes |= {p + "mlp.down_proj.weight": (64, 128), p + "self_attn.rotary_emb.inv_freq": (8,)}
    return shapes


def chatglm_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (VOCAB_SIZE, 64),
        "transformer.encoder.final_layernorm.weight": (64,),
        "transformer.output_layer.weight": (VOCAB_SIZE, 64),
        "transformer.rotary_pos_emb.inv_freq": (8,),
    }
    for n in range(2):
        p = f"transformer.encoder.layers.{n}."
        shapes |= {p + "input_layernorm.weight": (64,), p + "post_attention_layernorm.weight": (64,)}
        shapes |= {p + "self_attention.query_key_value.weight": (256, 64)}
        shapes |= {p + "self_attention.query_key_value.bias": (256,)}
        shapes |= {p + "self_attention.dense.weight": (64, 128)}
        shapes |= {p + "mlp.dense_h_to_4h.weight": (256, 64), p + "mlp.dense_4h_to_h.weight": (64, 128)}
    return shapes


ORIGINALS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "qwen": (QWEN, qwen_shapes()),
    "baichuan2": (BAICHUAN, baichuan_shapes()),
    "baichuan": (BAICHUAN | {"architectures": ["BaiChuanForCausalLM"]}, baichuan_shapes()),
    "chatglm": (CHATGLM, chatglm_shapes()),
}


def make_original(case: str, path: Path, **fields: Any) -> Path:
    """A random model in the names and the layout of the published checkpoints, in two files.

    Args:
        fields: of the config; ``...`` leaves a field out.
    """
    config, shapes = ORIGINALS[case]
    path.mkdir()
    chance = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=chance)
        tensors[name] = (
            (1 + 0.2 * noise) if len(shape) == 1 and "bias" not in name else 0.15 * noise
        ).bfloat16()
    names = list(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    given = {name: value for name, value in (config | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(given))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    tiny_tokenizer().save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
