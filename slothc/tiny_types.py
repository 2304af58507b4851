"""What the names of a config's fields cannot tell about making it small, per model type: lists whose length follows the depth in a way of
their own, sizes that must agree with one another, settings without a working default.
"""

from __future__ import annotations

from typing import Any

_ALTERNATE = ["sliding_attention", "full_attention"]
_LOCAL, _MROPE = {"rope_type": "default", "rope_theta": 10000.0}, {"mrope_section": [4, 2, 2]}
_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_GROUPED_OF_ONE = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_GEMMA4 = {"num_hidden_layers": 4, "layer_types": _ALTERNATE * 2, "num_key_value_heads": 1,
           "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}}  # fmt: skip
_WIDE_LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": 24,
                "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_rope_head_dim": 8}  # fmt: skip
_ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_key_value_heads": 4}

EXTRA: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": _ALTERNATE, "rope_parameters": {"sliding_attention": _LOCAL | _MROPE, "full_attention": None}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": _GROUPED_OF_ONE,
    "dory": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
             "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "deepseek_v4": {"partial_rotary_factor": 0.25, "rope_parameters": {"main": _QUARTER, "compress": {**_QUARTER, "rope_theta": 160000.0}}},
    "dots1": {"n_routed_experts": 4, **_GROUPED_OF_ONE},
    "dots3_note_text": {"head_dim": 24, "layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
                        "index_n_heads": 4, "per_layer_config": {1: _WIDE_LATENT}},
    "dots3_note_audio_encoder": {"adapter_out_dim": 64, "adapter_input_size": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": _ALTERNATE * 2, "num_kv_shared_layers": 2, "intermediate_size": [128] * 4,
                     "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": {**_GEMMA4, "num_kv_shared_layers": 2},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hrm_text": {"num_hidden_layers": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {**_ZAMBA, "n_mamba_heads": 4, "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
