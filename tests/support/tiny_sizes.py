"""Small values for the size fields in configs of transformers, by the field's name."""

from __future__ import annotations

VOCABULARY = 512
LAYERS = 2
HEADS = 4

_NAMES: dict[int, str] = {
    512: """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
        encoder_hash_byte_group_vocab max_position_embeddings n_positions n_ctx max_seq_len context_length
        max_target_positions
    """,
    128: """
        intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff d_ff mlp_dim
        ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size attention_hidden_size
    """,
    64: """
        hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size dim_model_base
        output_embedding_size word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
        lru_width expert_ffn_hidden_size router_hidden_size hidden_size_global ple_embed_dim out_hidden_size
        backbone_hidden_size vision_output_dim pronunciation_embed_dim shape_embed_dim input_size
        moe_latent_size hidden_size_per_layer_input adapter_in_dim adapter_out_dim adapter_input_size
        pronunciation_vocab_size shape_vocab_size output_channels nemo_conv_channels ext_pw_out_channel
        depthwise_separable_out_channel
    """,
    32: """
        q_lora_rank kv_lora_rank o_lora_rank qk_head_dim index_head_dim attention_head_dim prompt_length
        hc_lowrank image_size crop_size laurel_rank
    """,
    16: """
        head_dim d_kv d_head qk_nope_head_dim qk_rope_head_dim v_head_dim global_head_dim swa_head_dim
        swa_v_head_dim dim_head kv_channels attention_head_size linear_head_dim linear_key_head_dim
        linear_value_head_dim mamba_d_state mamba_d_head mamba_head_dim ssm_state_size state_size
        mamba_dt_rank time_step_rank d_rel rel_extent patch_size num_position_embeddings num_mel_bins
        sliding_window sliding_window_size attention_window_size local_attention window_size
        attention_chunk_size keep_window_size local_attention_window_len
    """,
    8: "rotary_dim mamba_n_heads mamba_num_heads index_topk chunk_size mamba_chunk_size",
    HEADS: """
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads num_query_groups
        num_experts n_routed_experts num_local_experts moe_num_experts
    """,
    2: """
        num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads
        linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k moe_top_k moe_topk n_group
        num_expert_group num_codebooks num_hidden_layers n_layer n_layers num_layers decoder_layers
        encoder_layers num_decoder_layers num_encoder_layers num_blocks depth num_layers_per_stack
        num_global_layers
    """,
    1: """
        topk_group n_shared_experts num_shared_experts moe_num_shared_experts mamba_n_groups n_groups
        num_nextn_predict_layers zero_expert_num num_hash_layers first_k_dense_replace num_dense_layers
    """,
}

SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Small values by name. The head sizes and ranks fit each other: 64 = 4 heads of 16."""

LAYER_COUNTS = tuple(name for name in _NAMES[2].split() if "layer" in name or name == "num_blocks")
"""Fields that count the layers of a model."""

UNSET = frozenset(
    ["num_key_value_heads", "head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"]
)
"""Fields that some classes leave unset although their models need them."""
