"""ChatGLM2 and ChatGLM3 (``model_type`` chatglm, ChatGLMModel) as transformers' GLM.

Equations of a layer (https://arxiv.org/abs/2406.12793 and the published configs)::

    x = input_layernorm(h)                            RMSNorm, layernorm_epsilon
    q, k, v = split(query_key_value x + bias)         num_attention_heads heads for q, multi_query_group_num
                                                      for k and for v, of kv_channels each
    h = h + dense attention(rope(q), rope(k), v)      the first half of a head is rotated, in pairs
                                                      (2i, 2i + 1), base 10000
    a, b = split(dense_h_to_4h y, 2)                  with y = post_attention_layernorm(h)
    h = h + dense_4h_to_h (silu(a) * b)

GLM computes the same; dense_h_to_4h is its gate_up_proj.

``rope_ratio`` (the 32k variants) divides the positions in some published versions of the code and multiplies
the base in others. The config does not tell which, so models with one are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GlmConfig

from adapters.base.converted.conversion import Conversion, Converted, Names, field, require, split

ORIGINAL_NAMES = {
    "query_key_value": "q_proj, k_proj and v_proj",
    "dense": "o_proj",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
}

_EOS = 2
"""``</s>`` of the tokenizer. The first published configs do not state it."""

_TURN_ENDS = ("<|user|>", "<|observation|>")
"""Of ChatGLM3. The tokenizer of ChatGLM2 does not have them."""

_NAMES = Names(
    "chatglm",
    {
        "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "transformer.encoder.final_layernorm.weight": "model.norm.weight",
        "transformer.output_layer.weight": "lm_head.weight",
    },
    "transformer.encoder.layers",
    {
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
    },
    r"transformer\.rotary_pos_emb\.inv_freq",
)


def conversion(config: Mapping[str, Any]) -> Conversion:
    """Raises BaseModelError."""
    heads, groups = field(config, "num_attention_heads"), field(config, "multi_query_group_num")
    width = field(config, "kv_channels")
    field(config, "multi_query_attention")
    require(
        config,
        {
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "multi_query_attention": True,
            "original_rope": True,
            "post_layer_norm": True,
            "pre_seq_len": None,
            "quantization_bit": 0,
            "rmsnorm": True,
            "rope_ratio": 1,
            "tie_word_embeddings": False,
        },
    )
    native = GlmConfig(
        vocab_size=field(config, "padded_vocab_size"),
        hidden_size=field(config, "hidden_size"),
        intermediate_size=field(config, "ffn_hidden_size"),
        num_hidden_layers=field(config, "num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        max_position_embeddings=field(config, "seq_length"),
        rms_norm_eps=field(config, "layernorm_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        attention_bias=field(config, "add_qkv_bias"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id") or _EOS,
        pad_token_id=config.get("pad_token_id") or 0,
    )
    sizes = [heads * width, groups * width, groups * width]
    return Conversion(native, lambda name, tensor: _convert(name, tensor, sizes), lambda _: _TURN_ENDS)


def _convert(name: str, tensor: Tensor, sizes: list[int]) -> Converted:
    place = _NAMES.layer_and_rest(name)
    if place is None or not place[1].startswith("self_attention.query_key_value."):
        return _NAMES.renamed(name, tensor)
    kind = place[1].rpartition(".")[2]
    parts = split(name, tensor, sizes)
    return {f"{place[0]}.self_attn.{one}_proj.{kind}": part for one, part in zip("qkv", parts, strict=True)}
