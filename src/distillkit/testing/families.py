"""Tiny random models of every causal language model type of transformers.

Each has few layers, and windows, chunks and other thresholds of a few tokens, so that short rows cross them.
"""

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 64
"""Logits of each model."""
LAYERS = 4
POSITIONS = 64
WINDOW = 4
"""Tokens of a sliding window, a chunk, or anything else that long rows exceed."""

# Sizes by the names that configurations give them; the first pattern that matches counts.
_SIZES = (
    (r"chunk_size_feed_forward", 0),
    (r".*vocab_size(_per_layer_input|_base)?|encoder_hash_byte_group_vocab", VOCAB),
    (r"(attention_)?hidden_size|n_embd|d_model|emb_dim|embedding_dim|word_embed_proj_dim|.*embedding_size", 32),
    (r"lru_width|backbone_hidden_size|ple_embed_dim", 32),
    (r"dim_model_base", 16),
    (r"hidden_size_per_layer_input|(moe|expert|shared|moe_shared).*(intermediate|hidden)_size|laurel_rank", 16),
    (r"router_hidden_size", 16),
    (r".*intermediate_size.*|dff|dim_ff|.*ffn_dim|.*ffn_hidden_size|feed_forward_size|d_inner|n_inner", 64),
    (r"(num|n|decoder|encoder|num_encoder|num_decoder|swa_num)?_?(attention_heads|heads?)|linear_num_value_heads", 4),
    (r".*key_value_heads|num_kv_heads|kv_n_heads|linear_num_key_heads|n_mamba_heads|indexer_kv_heads", 2),
    (r"index(er)?_n_heads", 16),  # fewer would often score two keys the same: zero
    (r"linear_num_heads", 4),
    (r".*head_dim|attention_head_size|dim_head|d_head|kv_channels|mamba_d_head|rotary_dim", 8),
    (r".*rank", 16),
    (r"(num|n|decoder|encoder|num_encoder|num_decoder|num_hidden)?_?(hidden_)?layers?|num_blocks", LAYERS),
    (r"(num|n)_(routed|local)?_?experts|moe_num_experts|zero_expert_num", 4),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|moe_num_shared_experts|n_shared_experts|num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|.*_layer_offset|moe_layer_start_index|num_mem_blocks", 1),
    (r"num_kv_shared_layers|.*_layer_period|sliding_window_pattern|no_rope_layer_interval|full_attention_interval", 2),
    (r"global_attn_every_n_layers|interleave_moe_layer_step", 2),
    (r"moe_layer_end_index|num_layers_per_stack", LAYERS - 1),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_(target|source)_positions", POSITIONS),
    (r"sliding_window(_size)?|.*window_size|local_attention|attention_chunk_size|floor_scale|index_block_size", WINDOW),
    (r"original_max_position_embeddings|rel_extent", 2 * WINDOW),
    (r"index_topk|indexer_budget|block_size|(lsh|local)_attn_chunk_length|(mamba_)?chunk_size", WINDOW),
    (r"index_topk_blocks|index_local_blocks", 1),
    (r"max_window_layers", LAYERS // 2),
    (r".*d_state|state_size|ssm_state_size", 8),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_?groups|n_groups|split_ngram_parts|make_ngram_vocab_size_divisible_by", 1),
    (r"ngram_size|heads_per_ngram|hc_count|hc_mult|indexer_compress_ratio|o_groups", 2),
)

_ALTERNATING = ("sliding_attention", "full_attention")
_LINEAR = ("linear_attention", "full_attention")


def _kinds(*names: str) -> dict[str, Any]:
    return {"layer_types": [names[index % len(names)] for index in range(LAYERS)]}


_DECODER: dict[str, Any] = {"is_decoder": True}
_PADDED: dict[str, Any] = {"pad_token_id": 0}  # positions are counted from the tokens that are not padding
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What the sizes alone do not say.
_SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _DECODER | _PADDED),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _DECODER | _PADDED),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "prophetnet"), _PADDED),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert"), _DECODER),
    **dict.fromkeys(("rembert", "roc_bert", "roformer"), _DECODER),
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "dots1": _kinds(*_ALTERNATING),
    "falcon_h1": {"mamba_d_head": 8},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3n_text": {"intermediate_size": [64] * LAYERS, "activation_sparsity_pattern": [0.5, 0.0] * (LAYERS // 2)},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "laguna": _kinds(*_ALTERNATING),
    "lfm2": _kinds("conv", "full_attention"),
    "lfm2_moe": _kinds("conv", "full_attention"),
    "mamba2": {"num_heads": 8},
    "mellum": _kinds(*_ALTERNATING),
    "mimo_v2_flash": _kinds(*_ALTERNATING),
    "minimax_m3_vl_text": _kinds("minimax_m3_sparse", "full_attention"),
    "minicpm3": {"num_key_value_heads": 4},
    "olmo_hybrid": _kinds(*_LINEAR),
    "kimi_linear": {"num_key_value_heads": 4},
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 16},
    **{name: {"use_sliding_window": True, **_kinds(*_ALTERNATING)} for name in ("qwen2", "qwen2_moe", "qwen3")},
    "qwen4_exp_text": {"indexer_kv_heads": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * LAYERS, **_DECODER, **_PADDED},
    "vaultgemma": {"attn_logit_softcapping": 5.0},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX", **_DECODER, **_PADDED},
    "youtu": {"num_key_value_heads": 4},
    "xlstm": {"autocast_kernel_dtype": "float32", "inference_state_dtype": "float32"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2),
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},
}


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": 2 * WINDOW,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 2 * WINDOW}),
    "llama, dynamic NTK": (
        "llama",
        {"rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 2 * WINDOW},
    ),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": _ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2 * WINDOW}
        },
    ),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "lfm2, convolutions alone": ("lfm2", {"layer_types": ["conv"] * LAYERS}),
    "granitemoehybrid, attention alone": ("granitemoehybrid", {"layer_types": ["attention"] * LAYERS}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "qwen2_moe, some layers dense": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "opt, post-norm and projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
"""Settings of some types that take other paths: name, type and settings."""


def family_names() -> list[str]:
    """The causal language model types of the installed transformers, and variants of some."""
    return [*causal_types(), *VARIANTS]


def causal_types() -> list[str]:
    """All model types for which the installed transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **settings: object) -> "PreTrainedConfig":
    """A configuration of a few thousand parameters.

    Args:
        model_type: A name of `causal_types`.
        settings: Further settings.
    """
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], _SETTINGS.get(model_type, {}) | settings)


def tiny_family(model_type: str, seed: int = 0, **settings: object) -> "PreTrainedModel":
    """A tiny random model of a type, in eval mode, whose tokens depend clearly on those before them.

    Args:
        model_type: A name of `causal_types`.
        seed: Seed of the weights; the global random state does not change.
        settings: Further settings of its configuration.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def _shrunk(config_class: type["PreTrainedConfig"], settings: dict[str, Any]) -> "PreTrainedConfig":
    default = config_class()
    sizes: dict[str, Any] = {}
    for field in fields(config_class):
        value = vars(default).get(field.name)
        if field.name.endswith("_token_id"):
            sizes[field.name] = _token(field.name, field.type)
        elif isinstance(value, float) and re.search("drop|jitter|_noise", field.name):
            sizes[field.name] = 0.0  # in training mode a loop of one row draws other random numbers
        elif isinstance(value, bool) or not (isinstance(value, int) or (value is None and "int" in str(field.type))):
            continue
        elif (size := _size(field.name)) is not None:
            sizes[field.name] = size
    if isinstance(kinds := vars(default).get("layer_types"), list) and "layer_types" not in settings:
        distinct = list(dict.fromkeys(kinds))
        sizes["layer_types"] = [distinct[index % len(distinct)] for index in range(LAYERS)]
    for name in config_class.sub_configs or {}:
        if (part := vars(default).get(name)) is not None:
            sizes[name] = _shrunk(type(part), _SETTINGS.get(part.model_type, {}))
    return config_class(**sizes | settings)


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def _token(name: str, annotation: object) -> int | None:
    """A special token: 1 ends a turn, and there is neither a start nor padding where a type can do without."""
    if name == "eos_token_id":
        return 1
    optional = name in ("bos_token_id", "pad_token_id") and "None" in str(annotation)
    return None if optional else 0  # of images and sounds
