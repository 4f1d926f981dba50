"""The architectures of GGUF files: one table, and what each says beyond what all say.

A function gives fields of config.json from metadata and from which tensors there are; the model's
own description reads them, as it does those of a checkpoint. Reads no values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.loader.gguf_fields import Fields

Config = dict[str, Any]


def _nothing(fields: Fields) -> Config:
    return {}


@dataclass(frozen=True)
class Family:
    """`rotated`: rows of q and k lie in pairs, as llama.cpp turns them.

    `from_one`: norms are stored with the 1 that checkpoints leave out. `names`: (pattern,
    replacement) of tensors that other families call otherwise. `variants`: which files are of
    another family, and of which.
    """

    architecture: str
    config: Callable[[Fields], Config] = _nothing
    rotated: bool = False
    from_one: bool = False
    names: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[Callable[[Fields], bool], "Family"], ...] = ()


def _llama(fields: Fields) -> Config:
    return {"mlp_bias": fields.has("ffn_up.bias")}


def _experts(fields: Fields) -> Config:
    """Under each name that a family gives their numbers."""
    count, used = fields.whole("expert_count", 0), fields.whole("expert_used_count", 0)
    if not count:
        return {}
    inner = fields.whole("expert_feed_forward_length", fields.whole("feed_forward_length"))
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner,
    }


def _qwen2moe(fields: Fields) -> Config:
    shared = fields.whole("expert_shared_feed_forward_length", 0)
    if not shared:  # older files; the tensor has it
        shared = fields.file.tensors["blk.0.ffn_up_shexp.weight"].shape[0]
    bias = fields.has("attn_q.bias")
    return _experts(fields) | {"shared_expert_intermediate_size": shared, "qkv_bias": bias}


def _qwen3moe(fields: Fields) -> Config:
    return _experts(fields) | {"norm_topk_prob": True}


def _windows(fields: Fields, period: int, default: int = 0) -> Config:
    """All layers but each `period`-th have the window, unless the file says which."""
    window = fields.whole("attention.sliding_window", default)
    if not window:
        return {}
    kinds = {True: "sliding_attention", False: "full_attention"}
    pattern = fields.pattern("attention.sliding_window_pattern", period)
    return {"sliding_window": window, "layer_types": [kinds[some] for some in pattern]}


def _gemma2(fields: Fields) -> Config:
    caps = {
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }
    return caps | _windows(fields, 2, 4096) | {"query_pre_attn_scalar": _gemma_scale(fields, 46)}


def _gemma3(fields: Fields) -> Config:
    return _windows(fields, 6) | {
        "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _gemma_scale(fields, 62),
    }


def _gemma_scale(fields: Fields, largest: int) -> int:
    """Only the largest model, known by its layers, does not take the size of a head."""
    each = fields.whole("embedding_length") // fields.whole("attention.head_count")
    if fields.whole("block_count") == largest:
        return each
    return fields.whole("attention.key_length", each)


def _plain_mlp(fields: Fields) -> Config:
    """Without a gate, under each name that a family gives its width."""
    inner = fields.whole("feed_forward_length")
    return {"n_inner": inner, "ffn_hidden_size": inner, "hidden_act": "gelu"}


def _gpt2(fields: Fields) -> Config:
    return _plain_mlp(fields) | {
        "n_positions": fields.whole("context_length"),
        "activation_function": "gelu_new",
    }


def _phi2(fields: Fields) -> Config:
    return _plain_mlp(fields) | {"hidden_act": "gelu_new"}


def _starcoder2(fields: Fields) -> Config:
    act = {"hidden_act": "gelu_pytorch_tanh"}
    return _plain_mlp(fields) | act | {"use_bias": fields.has("attn_q.bias")}


def _gptneox(fields: Fields) -> Config:
    return _plain_mlp(fields) | {
        "use_parallel_residual": fields.truth("use_parallel_residual", True),
        "attention_bias": fields.has("attn_qkv.bias"),
    }


def _falcon(fields: Fields) -> Config:
    heads = fields.whole("attention.head_count_kv")
    return _plain_mlp(fields) | {
        "activation": "gelu",
        "new_decoder_architecture": _two_norms(fields) or heads > 1,
        "num_ln_in_parallel_attn": 2 if _two_norms(fields) else 1,
        "num_kv_heads": heads,
        "bias": fields.has("attn_qkv.bias"),
    }


def _mpt(fields: Fields) -> Config:
    most = fields.number("attention.max_alibi_bias", 8.0)
    clip = fields.number("attention.clamp_kqv", 0.0)
    return {"attn_config": {"alibi": most > 0, "alibi_bias_max": most, "clip_qkv": clip}}


def _dbrx(fields: Fields) -> Config:
    return {
        "attn_config": {
            "kv_n_heads": fields.whole("attention.head_count_kv"),
            "clip_qkv": fields.number("attention.clamp_kqv", 0.0),
            "rope_theta": fields.number("rope.freq_base", 10000.0),
        },
        "ffn_config": {
            "ffn_hidden_size": fields.whole("feed_forward_length"),
            "moe_num_experts": fields.whole("expert_count"),
            "moe_top_k": fields.whole("expert_used_count"),
        },
    }


def _stablelm(fields: Fields) -> Config:
    return {
        "use_qkv_bias": fields.has("attn_q.bias"),
        "qk_layernorm": fields.has("attn_q_norm.weight"),
        "use_parallel_residual": not fields.has("ffn_norm.weight"),
    }


def _cohere(fields: Fields) -> Config:
    scale = {"logit_scale": fields.number("logit_scale", 0.0625)}
    return scale | {"use_qk_norm": fields.has("attn_q_norm.weight")}


def _cohere2(fields: Fields) -> Config:
    return _cohere(fields) | _windows(fields, 4)


def _exaone4(fields: Fields) -> Config:
    """Only the model of 64 layers has windows, whatever a file says of them."""
    large = fields.whole("block_count") == 64
    return _windows(fields, 4, 4096) if large else {}


def _phi3(fields: Fields) -> Config:
    return {"sliding_window": fields.whole("attention.sliding_window", 0)}


def _phimoe(fields: Fields) -> Config:
    head = "output.bias" in fields.file.tensors
    return _experts(fields) | _phi3(fields) | {"lm_head_bias": head}


def _olmo(fields: Fields) -> Config:
    return {"clip_qkv": fields.number("attention.clamp_kqv", 0.0)}


def _olmo3(fields: Fields) -> Config:
    return _windows(fields, 4)


def _granite(fields: Fields) -> Config:
    head = fields.whole("embedding_length") // fields.whole("attention.head_count")
    return _experts(fields) | {
        "attention_multiplier": fields.number("attention.scale", head**-0.5) or head**-0.5,
        "embedding_multiplier": fields.number("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": fields.number("residual_scale", 1.0) or 1.0,
        "logits_scaling": fields.number("logit_scale", 1.0) or 1.0,
        "mlp_bias": fields.has("ffn_up.bias"),
    }


def _minicpm(fields: Fields) -> Config:
    """Files that do not say are those of the first models."""
    depth, hidden = fields.whole("block_count") ** 0.5, fields.whole("embedding_length")
    return {
        "scale_emb": fields.number("embedding_scale", 12.0),
        "scale_depth": fields.number("residual_scale", 1.4 / depth) * depth,
        "dim_model_base": hidden / fields.number("logit_scale", hidden / 256),
    }


def _latent(fields: Fields) -> Config:
    """Older files have the sizes of a head where newer ones have those of what is cached."""
    turned = fields.whole("rope.dimension_count")
    keys = fields.whole("attention.key_length_mla", fields.whole("attention.key_length"))
    values = fields.whole("attention.value_length_mla", fields.whole("attention.value_length", 0))
    heads = fields.whole("attention.head_count")
    return {
        "q_lora_rank": fields.whole("attention.q_lora_rank", 0),
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "qk_nope_head_dim": keys - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": values or fields.whole("embedding_length") // heads,
        "head_dim": keys,
        "num_key_value_heads": heads,
        "partial_rotary_factor": 1.0,
    }


def _minicpm3(fields: Fields) -> Config:
    return _minicpm(fields) | _latent(fields)


def _deepseek2(fields: Fields) -> Config:
    groups = fields.whole("expert_group_count", 1)
    return _latent(fields) | {
        "n_routed_experts": fields.whole("expert_count"),
        "n_shared_experts": fields.whole("expert_shared_count", 0),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": fields.whole("expert_group_used_count", 1),
    }


def _glm4moe(fields: Fields) -> Config:
    extra = fields.whole("nextn_predict_layers", 0)
    return {
        "num_hidden_layers": fields.whole("block_count") - extra,
        "n_routed_experts": fields.whole("expert_count"),
        "n_shared_experts": fields.whole("expert_shared_count", 0),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.truth("expert_weights_norm", True),
        "use_qk_norm": fields.has("attn_q_norm.weight"),
        "n_group": fields.whole("expert_group_count", 1),
        "topk_group": fields.whole("expert_group_used_count", 1),
    }


def _ernie(fields: Fields) -> Config:
    return {"use_bias": fields.has("attn_q.bias")}


def _ernie_moe(fields: Fields) -> Config:
    return _ernie(fields) | {
        "moe_num_experts": fields.whole("expert_count"),
        "moe_k": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "moe_num_shared_experts": fields.whole("expert_shared_count", 0),
        "moe_layer_start_index": fields.whole("leading_dense_block_count", 0),
        "moe_layer_interval": fields.whole("interleave_moe_layer_step", 1),
    }


def _gpt_oss(fields: Fields) -> Config:
    """The ramp of its positions is not rounded; files do not say so."""
    scaling = {"rope_scaling": {"truncate": False}}
    return _experts(fields) | _windows(fields, 2) | scaling


def _llama4(fields: Fields) -> Config:
    """Chunks, temperatures and q and k norms are llama.cpp's constants too."""
    experts = fields.whole("expert_count")
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "intermediate_size": fields.whole("expert_feed_forward_length"),
        "intermediate_size_mlp": fields.whole("feed_forward_length"),
        "interleave_moe_layer_step": fields.whole("interleave_moe_layer_step"),
        "attention_chunk_size": 8192,
        "use_qk_norm": experts != 128,
    }


def _minimax(fields: Fields) -> Config:
    inner = fields.whole("expert_feed_forward_length", fields.whole("feed_forward_length"))
    return _experts(fields) | {"intermediate_size": inner}


def _baichuan(fields: Fields) -> Config:
    """The model of 40 layers has slopes instead of rotary positions."""
    if fields.whole("block_count") != 40:
        return {}
    return {"max_position_embeddings": None, "model_max_length": fields.whole("context_length")}


def _sparse(fields: Fields) -> bool:
    return fields.whole("expert_count", 0) > 0


def _windowed(fields: Fields) -> bool:
    return fields.whole("attention.sliding_window", 0) > 0


def _sigmoid(fields: Fields) -> bool:
    return fields.whole("expert_gating_func", 0) == 2


def _two_norms(fields: Fields) -> bool:
    return fields.has("attn_norm_2.weight")


_BOTH = ((r"\.ffn_norm\.", ".pre_feedforward_layernorm."),)
_GATE_UP = ((r"\.ffn_up\.", ".mlp.gate_up_proj."),)
_FALCON = ((r"\.attn_norm\.", ".post_attention_layernorm."), (r"\.attn_norm_2\.", ".attn_norm."))

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _llama,
        rotated=True,
        variants=((_sparse, Family("MixtralForCausalLM", _experts, rotated=True)),),
    ),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen2moe": Family("Qwen2MoeForCausalLM", _qwen2moe),
    "qwen3moe": Family("Qwen3MoeForCausalLM", _qwen3moe),
    "gemma": Family("GemmaForCausalLM", from_one=True),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, from_one=True, names=_BOTH),
    "gemma3": Family("Gemma3ForCausalLM", _gemma3, from_one=True, names=_BOTH),
    "phi2": Family("PhiForCausalLM", _phi2),
    "phi3": Family("Phi3ForCausalLM", _phi3, names=_GATE_UP),
    "phimoe": Family("PhimoeForCausalLM", _phimoe),
    "chatglm": Family("GlmForCausalLM", names=_GATE_UP),
    "glm4": Family("Glm4ForCausalLM", names=_BOTH + _GATE_UP),
    "glm4moe": Family("Glm4MoeForCausalLM", _glm4moe),
    "olmo": Family("OlmoForCausalLM", _olmo, rotated=True),
    "olmo2": Family(
        "Olmo2ForCausalLM", variants=((_windowed, Family("Olmo3ForCausalLM", _olmo3)),)
    ),
    "olmoe": Family("OlmoeForCausalLM", _experts),
    "granite": Family("GraniteForCausalLM", _granite, rotated=True),
    "granitemoe": Family("GraniteMoeForCausalLM", _granite, rotated=True),
    "starcoder2": Family("Starcoder2ForCausalLM", _starcoder2),
    "stablelm": Family("StableLmForCausalLM", _stablelm),
    "gpt2": Family("GPT2LMHeadModel", _gpt2),
    "gptneox": Family("GPTNeoXForCausalLM", _gptneox),
    "falcon": Family(
        "FalconForCausalLM",
        _falcon,
        variants=((_two_norms, Family("FalconForCausalLM", _falcon, names=_FALCON)),),
    ),
    "command-r": Family("CohereForCausalLM", _cohere),
    "cohere2": Family("Cohere2ForCausalLM", _cohere2),
    "bloom": Family("BloomForCausalLM", _plain_mlp),
    "mpt": Family("MptForCausalLM", _mpt),
    "dbrx": Family("DbrxForCausalLM", _dbrx),
    "internlm2": Family("InternLM2ForCausalLM", rotated=True),
    "baichuan": Family("BaichuanForCausalLM", _baichuan, rotated=True),
    "minicpm": Family("MiniCPMForCausalLM", _minicpm, rotated=True),
    "minicpm3": Family("MiniCPM3ForCausalLM", _minicpm3),
    "nemotron": Family("NemotronForCausalLM", from_one=True),
    "exaone4": Family("Exaone4ForCausalLM", _exaone4),
    "smollm3": Family("SmolLM3ForCausalLM", rotated=True),
    "arcee": Family("ArceeForCausalLM", lambda fields: {"hidden_act": "relu2"}, rotated=True),
    "ernie4_5": Family("Ernie4_5ForCausalLM", _ernie),
    "ernie4_5-moe": Family("Ernie4_5_MoeForCausalLM", _ernie_moe),
    "deepseek2": Family(
        "DeepseekV2ForCausalLM",
        _deepseek2,
        variants=((_sigmoid, Family("DeepseekV3ForCausalLM", _deepseek2)),),
    ),
    "gpt-oss": Family("GptOssForCausalLM", _gpt_oss),
    "llama4": Family("Llama4ForCausalLM", _llama4),
    "minimax-m2": Family("MiniMaxM2ForCausalLM", _minimax),
}
"""general.architecture -> family."""
