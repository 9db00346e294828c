"""Baichuan-7B and Baichuan2-7B (``model_type`` baichuan) as transformers' Llama.

Equations of a layer (https://arxiv.org/abs/2309.10305 and the published configs)::

    x = input_layernorm(h)                       RMSNorm, rms_norm_eps
    q, k, v = split(W_pack x, 3)                 one linear of 3 * hidden rows, no bias
    h = h + o_proj attention(rope(q), rope(k), v)   pairs (i, i + half), base 10000
    h = h + down_proj (silu(gate_proj y) * up_proj y)   with y = post_attention_layernorm(h)

The logits of Baichuan2 are ``W x`` with each row of the head W divided by its length (NormHead).
The conversion divides the rows. Baichuan-7B (BaiChuanForCausalLM) has a plain head.

The 13B models have no rotary embedding but ALiBi: a bias on the attention scores that grows with the
distance. The engine's attention has no such bias, so they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaConfig

from adapters.base.converted.conversion import Conversion, Converted, Names, field, require, split
from adapters.errors import BaseModelError

ORIGINAL_NAMES = {"W_pack": "q_proj, k_proj and v_proj"}

_WITH_PLAIN_HEAD = ("BaiChuanForCausalLM", 64000)
_WITH_NORMED_HEAD = ("BaichuanForCausalLM", 125696)
"""Architecture and vocabulary, as published."""

_BLOCK = 4096
_HIDDEN_13B = 5120
"""Of the 13B models. They have ``model_max_length`` in place of ``max_position_embeddings``."""

_NAMES = Names(
    "baichuan",
    {name: name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")},
    "model.layers",
    {
        f"{name}.weight": f"{name}.weight"
        for name in (
            *("input_layernorm", "post_attention_layernorm", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    },
)


def conversion(config: Mapping[str, Any]) -> Conversion:
    """Raises BaseModelError."""
    hidden, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    if "max_position_embeddings" not in config or hidden == _HIDDEN_13B:
        raise BaseModelError(
            "Baichuan-13B and Baichuan2-13B cannot be served: they have ALiBi in place of rotary embeddings, "
            "and this server's attention does not support it. Give --base another model (Baichuan2-7B)."
        )
    require(config, {"hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None})
    native = LlamaConfig(
        vocab_size=field(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=field(config, "intermediate_size"),
        num_hidden_layers=field(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=field(config, "rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
    )
    normed = _has_normed_head(config)
    return Conversion(native, lambda name, tensor: _convert(name, tensor, hidden, normed))


def _has_normed_head(config: Mapping[str, Any]) -> bool:
    """No field says so. The name of the class does, and the published vocabularies must agree with it."""
    architecture = (config.get("architectures") or [None])[0]
    vocabularies = dict((_WITH_PLAIN_HEAD, _WITH_NORMED_HEAD))
    others = set(vocabularies.values()) - {vocabularies.get(architecture)}
    if architecture not in vocabularies or config["vocab_size"] in others:
        raise BaseModelError(
            f"This baichuan model ({architecture}, vocabulary {config['vocab_size']}) is neither Baichuan-7B "
            f"({', vocabulary '.join(map(str, _WITH_PLAIN_HEAD))}) nor Baichuan2-7B "
            f"({', vocabulary '.join(map(str, _WITH_NORMED_HEAD))}), so its output head is not known. Give "
            "--base another model."
        )
    return bool(architecture == _WITH_NORMED_HEAD[0])


def _convert(name: str, tensor: Tensor, hidden: int, normed: bool) -> Converted:
    if normed and name == "lm_head.weight":
        # In blocks, because all of it in float32 would take gigabytes.
        return {name: torch.cat([normalize(rows.float()).to(rows) for rows in torch.split(tensor, _BLOCK)])}
    place = _NAMES.layer_and_rest(name)
    if place is None or place[1] != "self_attn.W_pack.weight":
        return _NAMES.renamed(name, tensor)
    parts = split(name, tensor, [hidden] * 3)
    return {f"{place[0]}.self_attn.{one}_proj.weight": part for one, part in zip("qkv", parts, strict=True)}
