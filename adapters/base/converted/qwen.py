"""Qwen of the first generation (``model_type`` qwen, QWenLMHeadModel) as transformers' Qwen2.

Equations of a layer (https://arxiv.org/abs/2309.16609 and the published configs)::

    x = ln_1(h)                                  RMSNorm, layer_norm_epsilon
    q, k, v = split(c_attn x + bias, 3)          one linear of 3 * hidden rows; all heads have keys and values
    h = h + c_proj attention(rope(q), rope(k), v)   pairs (i, i + half), base rotary_emb_base, no bias
    y = ln_2(h)
    h = h + mlp.c_proj (w1 y * silu(w2 y))       w1 and w2 have intermediate_size / 2 rows each

Qwen2 computes just that: w2 is its gate_proj and w1 its up_proj. Two switches change it for sequences of more
than ``seq_length`` tokens: ``use_logn_attn`` multiplies q by log(position) / log(seq_length), and
``use_dynamic_ntk`` raises the base by the length of the prompt. Qwen2 has neither. Within ``seq_length`` both
do nothing, so a model that has one of them on is served up to that length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen2Config

from adapters.base.context import EXACT_LENGTH
from adapters.base.converted.conversion import Conversion, Converted, Names, field, require, split

ORIGINAL_NAMES = {
    "c_attn": "q_proj, k_proj and v_proj",
    "c_proj": "o_proj or down_proj",
    "w1": "up_proj",
    "w2": "gate_proj",
}

_NAMES = Names(
    "qwen",
    {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    "transformer.h",
    {
        "ln_1.weight": "input_layernorm.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "mlp.w1.weight": "mlp.up_proj.weight",
        "mlp.w2.weight": "mlp.gate_proj.weight",
        "mlp.c_proj.weight": "mlp.down_proj.weight",
    },
    r"transformer\.rotary_emb\.inv_freq|.*\.attn\.(rotary_emb\.inv_freq|masked_bias|bias|logn_tensor)",
)


def conversion(config: Mapping[str, Any]) -> Conversion:
    """Raises BaseModelError."""
    hidden, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    require(
        config,
        {
            "no_bias": True,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "tie_word_embeddings": False,
            "kv_channels": hidden // heads,
            "apply_residual_connection_post_layernorm": False,
            "pos_emb": "rotary",
        },
    )
    native = Qwen2Config(
        vocab_size=field(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=field(config, "intermediate_size") // 2,
        num_hidden_layers=field(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=_length(config),
        rms_norm_eps=field(config, "layer_norm_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": float(field(config, "rotary_emb_base"))},
        tie_word_embeddings=False,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
    )
    if _is_scaled(config):
        setattr(native, EXACT_LENGTH, native.max_position_embeddings)
    return Conversion(native, lambda name, tensor: _convert(name, tensor, hidden), _turn_ends)


def _turn_ends(generation_config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("<|im_end|>", "<|im_start|>") if generation_config.get("chat_format") == "chatml" else ()


def _is_scaled(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_logn_attn", True) or config.get("use_dynamic_ntk", True))


def _length(config: Mapping[str, Any]) -> int:
    trained: int = field(config, "seq_length")
    return trained if _is_scaled(config) else max(trained, config.get("max_position_embeddings", trained))


def _convert(name: str, tensor: Tensor, hidden: int) -> Converted:
    place = _NAMES.layer_and_rest(name)
    if place is None or not place[1].startswith("attn.c_attn."):
        return _NAMES.renamed(name, tensor)
    kind = place[1].rpartition(".")[2]
    parts = split(name, tensor, [hidden] * 3)
    return {f"{place[0]}.self_attn.{one}_proj.{kind}": part for one, part in zip("qkv", parts, strict=True)}
