"""Small versions of real model configs: the same architecture, two layers deep and sixty-four wide.

A config is shrunk by what its fields are called, starting from its own values, so that everything that decides what
the graph computes (activation, norm, kind of rope, tied embeddings, soft-caps, layer kinds) stays as it is. It needs
transformers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .tiny_types import EXTRA

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD, INNER, VOCAB, EXPERTS = 64, 2, 4, 2, 16, 128, 256, 4

# value -> the names that mean it, over every causal language model that transformers carries
_NAMES: tuple[tuple[int | float, str], ...] = (
    (WIDTH, """
        hidden_size n_embd d_model embedding_size embedding_dim hidden_dim dim_model decoder_hidden_size
        lru_width input_embedding_size output_embedding_size word_embed_proj_dim hidden_size_global
        encoder_hidden_size emb_dim attention_hidden_size out_hidden_size input_size
    """),
    (LAYERS, """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
        num_global_layers num_encoder_layers num_decoder_layers num_encoder_hidden_layers
        num_hidden_layers_decoder num_layers_per_stack depth
    """),
    (HEADS, """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads swa_num_attention_heads linear_num_value_heads linear_num_key_heads mamba_n_heads
        mamba_num_heads index_n_heads time_step_rank mamba_dt_rank linear_num_heads n_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads
    """),
    (KV_HEADS, """
        num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups num_experts_per_tok
        moe_topk moe_k num_experts_per_token top_k_experts zero_expert_num
    """),
    (HEAD, """
        head_dim d_kv kv_channels attention_head_dim swa_head_dim d_head v_head_dim qk_nope_head_dim
        linear_head_dim attention_head_size linear_key_head_dim linear_value_head_dim index_head_dim
        global_head_dim mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size block_size
        index_topk hidden_size_per_layer_input laurel_rank dim_head pronunciation_embed_dim shape_embed_dim
        adapter_rank adapter_in_dim ple_embed_dim
    """),
    (8, """
        qk_rope_head_dim rotary_dim sliding_window sliding_window_size window_size attention_window_size
        attention_chunk_size local_attention_window_len keep_window_size
    """),
    (24, """
        qk_head_dim
    """),
    (32, """
        kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_headdim router_hidden_size
        hc_lowrank
    """),
    (INNER, """
        intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner
        mlp_dim shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size
        feed_forward_size max_position_embeddings n_positions n_ctx max_seq_len max_source_positions
        max_target_positions context_length model_max_length shared_experts_intermediate_size
        moe_shared_expert_intermediate_size
    """),
    (64, """
        moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size mamba_d_ssm
    """),
    (VOCAB, """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size
        pronunciation_vocab_size encoder_hash_byte_group_vocab
    """),
    (EXPERTS, """
        num_experts n_routed_experts num_local_experts moe_num_experts
    """),
    (1, """
        n_group topk_group num_expert_group n_shared_experts n_groups mamba_n_groups
    """),
    (0.0, """
        attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop attn_pdrop activation_dropout
        embedding_dropout attention_probs_dropout_prob hidden_dropout_prob attn_dropout resid_dropout
        residual_dropout ffn_dropout classifier_dropout layerdrop decoder_layerdrop encoder_layerdrop
        embed_dropout emb_pdrop summary_first_dropout attention_dropout_prob dropout_p feat_proj_dropout
        router_jitter_noise input_jitter_noise jitter_noise local_attention_probs_dropout_prob
        lsh_attention_probs_dropout_prob
    """),
)
_SIZES = {name: value for value, names in _NAMES for name in names.split()}
_KINDS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")
_NEVER = {"id2label", "label2id", "quantization_config", "transformers_version", "architectures", "dtype"}


def config_names() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` knows, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_class(name: str) -> Any:
    """The causal language model's class, a ``PreTrainedModel``, for a model type. Raises ``ValueError`` with the known names for any
    other."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if name not in config_names():
        raise ValueError(f"unknown model type {name!r}; known: {', '.join(config_names())}")
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]


def tiny_config(name: str) -> PreTrainedConfig:
    """The small config of a model type such as ``qwen3``, of the class that ``causal_class(name)`` is built from. Raises ``ValueError``
    with the known names for any other."""
    from transformers import AutoConfig

    causal_class(name)
    return shrink(causal_config(AutoConfig.for_model(name)))


def causal_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the causal language model of this type is built from: a decoder's own where the type is of several models."""
    wanted = causal_class(config.model_type).config_class
    parts = [getattr(config, part) for part in config.sub_configs if type(getattr(config, part)) is wanted]
    return config if isinstance(config, wanted) or not parts else parts[0]


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config at toy size. Sub-configs are shrunk too; dropout is off and no cache is kept."""
    values = {k: v for k, v in config.to_dict().items() if k not in _NEVER}
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            values[name] = shrink(getattr(config, name)).to_dict()
    chosen = {f.name for f in dataclasses.fields(config)} & values.keys() & _SIZES.keys()     # the others are the class's own
    small = {name: _SIZES[name] for name in chosen if _is_size(values[name])}
    small |= _heads(values, small) | _layers(values) | _tokens(values, small) | {"use_cache": False}
    if "rope_parameters" in values:
        small["rope_parameters"] = _rope(values["rope_parameters"])
    small |= EXTRA.get(getattr(config, "model_type", ""), {})
    return type(config).from_dict({**_own(config, values), **small})


def _own(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the class's defaults: what the class derives from its sizes, it derives from the small ones."""
    defaults = type(config)().to_dict()
    return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _heads(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Keep multi-head attention multi-head, multi-query multi-query, and an all-rotated head all rotated."""
    if values.get("head_dim") and values.get("head_dim") == values.get("qk_rope_head_dim"):
        return {"head_dim": _SIZES["qk_rope_head_dim"], **_heads({**values, "head_dim": None}, small)}
    unset = {"head_dim": HEAD} if values.get("head_dim", HEAD) is None and "qk_rope_head_dim" not in values else {}
    if "num_key_value_heads" not in values:
        return unset
    heads, shared = values.get("num_attention_heads"), values["num_key_value_heads"]
    own = shared is None or heads == shared
    return {"num_key_value_heads": small.get("num_attention_heads", HEADS) if own else min(shared, KV_HEADS), **unset}


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """One layer of every kind that the model has, two layers at least, and each list of kinds that long."""
    kinds = {name: list(dict.fromkeys(values[name])) for name in _KINDS if _is_kinds(values.get(name))}
    count = max([LAYERS, *map(len, kinds.values())])
    depth: dict[str, Any] = {n: count for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if kinds and n in values}
    lists: dict[str, Any] = {name: [found[i * len(found) // count] for i in range(count)] for name, found in kinds.items()}
    if isinstance(values.get("per_layer_config"), dict):
        lists["per_layer_config"] = {}
    if isinstance(values.get("num_attention_heads_per_layer"), (list, tuple)):
        lists["num_attention_heads_per_layer"] = [HEADS] * count
    return {**depth, **lists}


def _is_kinds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(kind, str) for kind in value)


def _tokens(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Special tokens inside the small vocabulary."""
    limit = small.get("vocab_size", VOCAB)
    fixed: dict[str, Any] = {}
    for name, value in values.items():
        if not name.endswith(("token_id", "token_index")):
            continue
        if isinstance(value, (list, tuple)) and any(v >= limit for v in value):
            fixed[name] = 2
        elif isinstance(value, int) and value >= limit:
            fixed[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, limit - 1 - len(fixed))
    return fixed


def _rope(parameters: Any) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    return {k: 64 if k == "original_max_position_embeddings" else _rope(v) for k, v in parameters.items()}
