"""Config fields of single classes, by model type, in addition to the rules of ``tiny_configs``.

Most are classes whose defaults have one kind of layer and whose published models have several. The others
have sizes that depend on each other, or defaults that their own code refuses.
"""

from __future__ import annotations

from typing import Any

_LFM2 = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
}
_DOTS3 = {
    "per_layer_config": {
        "02": {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "head_dim": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
    }
}
_TWO_KINDS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}

FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [128] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": _TWO_KINDS,
    "lfm2": _LFM2,
    "lfm2_moe": {**_LFM2, "num_dense_layers": 1},
    "llama4": {"text_config": {"moe_layers": [1]}},
    "llama4_text": {"moe_layers": [1]},
    "mamba2": {"num_heads": 8},
    "mellum": _TWO_KINDS,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "reformer": {
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
}

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision model needs timm",
    "gemma4_assistant": "it drafts for another model and reads that model's keys and values",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's keys and values",
    "musicgen": "the class takes the config of the decoder inside, not this one",
    "musicgen_melody": "the class takes the config of the decoder inside, not this one",
}
"""Model types without a tiny model, and the reasons."""
