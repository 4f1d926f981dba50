"""Tiny random checkpoints of each architecture, made by transformers.

Weights are drawn wide enough that attention is far from uniform, so that a wrong mask, rotation or
head mapping shows in the logits. `CASES` are the configurations that every path is tested on.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

_TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_OLD: dict[str, Any] = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The same for configurations with the names of GPT-2."""

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": "absent",
    "num_key_value_heads": 4,
}
_DEEPSEEK = {
    **_LATENT,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
_BASES: dict[str, dict[str, Any]] = {"gpt2": _OLD, "gptj": _OLD, "dbrx": {}, "mpt": {}, "bloom": {}}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_MULTI = {"num_key_value_heads": 4, "head_dim": 8}


def _config(architecture: str, changes: dict[str, Any]) -> transformers.PretrainedConfig:
    kind = getattr(transformers, architecture).config_class
    base = _BASES.get(kind.model_type, _TINY)
    fields = {**base, **changes}
    return kind(**{name: value for name, value in fields.items() if value != "absent"})


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


#: name -> (architecture, changes to the tiny configuration)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("LlamaForCausalLM", _rope("linear", factor=3.0)),
    "llama-dynamic": ("LlamaForCausalLM", _rope("dynamic", factor=2.0)),
    "llama-dynamic-long": (
        "LlamaForCausalLM",
        {**_rope("dynamic", factor=2.0), "max_position_embeddings": 24},
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn-mscale": (
        "LlamaForCausalLM",
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=0.7,
            mscale_all_dim=1.1,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
        ),
    ),
    "llama-longrope-short": (
        "LlamaForCausalLM",
        _rope(
            "longrope",
            factor=4.0,
            short_factor=[1.0 + 0.1 * i for i in range(8)],
            long_factor=[2.0 + 0.5 * i for i in range(8)],
            original_max_position_embeddings=128,
        ),
    ),
    "llama-longrope-long": (
        "LlamaForCausalLM",
        _rope(
            "longrope",
            short_factor=[1.0 + 0.1 * i for i in range(8)],
            long_factor=[2.0 + 0.5 * i for i in range(8)],
            original_max_position_embeddings=24,
        ),
    ),
    "llama-llama3": (
        "LlamaForCausalLM",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-proportional": (
        "LlamaForCausalLM",
        _rope("proportional", partial_rotary_factor=0.5),
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 11}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen2-layer-types": (
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {"mlp_bias": True}),
    "helium": ("HeliumForCausalLM", {"head_dim": 8}),
    "ministral": ("MinistralForCausalLM", {"sliding_window": 9, **_MIXED}),
    "phi3": ("Phi3ForCausalLM", {"head_dim": "absent", "pad_token_id": 0, "sliding_window": 12}),
    "phi3-partial": (
        "Phi3ForCausalLM",
        {"head_dim": "absent", "pad_token_id": 0, "partial_rotary_factor": 0.5},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "ernie": ("Ernie4_5ForCausalLM", {"use_bias": True}),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "olmo": ("OlmoForCausalLM", {"clip_qkv": 0.7, "pad_token_id": 0, "head_dim": "absent"}),
    "olmo2": ("Olmo2ForCausalLM", {"pad_token_id": 0, "head_dim": "absent"}),
    "olmo3": (
        "Olmo3ForCausalLM",
        {
            "sliding_window": 9,
            "pad_token_id": 0,
            "head_dim": "absent",
            **_MIXED,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        },
    ),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 9, **_MIXED}),
    "exaone4-full": (
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "gemma": ("GemmaForCausalLM", {"pad_token_id": 0}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 3.0,
            "pad_token_id": 0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "pad_token_id": 0,
            **_MIXED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 9000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "glm": ("GlmForCausalLM", {"pad_token_id": 0}),
    "glm4": ("Glm4ForCausalLM", {"pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4, "n_positions": 256}),
    "neox": ("GPTNeoXForCausalLM", {"head_dim": "absent", "num_key_value_heads": "absent"}),
    "neox-serial": (
        "GPTNeoXForCausalLM",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "head_dim": "absent",
            "num_key_value_heads": "absent",
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {
            "ffn_dim": 44,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
            "head_dim": "absent",
            "num_key_value_heads": "absent",
        },
    ),
    "falcon-7b": (
        "FalconForCausalLM",
        {"multi_query": True, "head_dim": "absent", "num_key_value_heads": "absent"},
    ),
    "falcon-40b": (
        "FalconForCausalLM",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "head_dim": "absent",
            "num_key_value_heads": "absent",
        },
    ),
    "falcon-serial": (
        "FalconForCausalLM",
        {
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "head_dim": "absent",
            "num_key_value_heads": "absent",
        },
    ),
    "phi": ("PhiForCausalLM", {"head_dim": "absent", "qk_layernorm": True}),
    "phi-plain": ("PhiForCausalLM", {"head_dim": "absent"}),
    "stablelm": ("StableLmForCausalLM", {"head_dim": "absent", "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        {"head_dim": "absent", "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {"head_dim": "absent", "sliding_window": 11}),
    "nemotron": ("NemotronForCausalLM", {}),
    "cohere": (
        "CohereForCausalLM",
        {"use_qk_norm": True, "pad_token_id": 0, "head_dim": "absent"},
    ),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 9, "pad_token_id": 0, **_MIXED}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 28, "head_dim": "absent"},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmoe": ("OlmoeForCausalLM", {**_EXPERTS, "clip_qkv": 1.5, "head_dim": "absent"}),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "head_dim": "absent",
        },
    ),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.7,
            "use_qk_norm": True,
        },
    ),
    "ernie-moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 20,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "head_dim": "absent",
        },
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "swiglu_limit": 0.8,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                truncate=False,
                beta_fast=32.0,
                beta_slow=1.0,
            ),
        },
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 256,
            "vocab_size": 101,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.2, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 20,
                "moe_num_experts": 5,
                "moe_top_k": 2,
                "hidden_size": 32,
            },
        },
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.4,
            "attention_bias": True,
            "lm_head_bias": True,
            "pad_token_id": 0,
            **_rope(
                "longrope",
                short_factor=[1.0 + 0.1 * i for i in range(8)],
                # transformers takes those of short prompts always, the model's own code these.
                long_factor=[1.0 + 0.1 * i for i in range(8)],
                short_mscale=1.1,
                long_mscale=1.3,
                original_max_position_embeddings=8,
            ),
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_local_experts": 5,
            "intermediate_size": 20,
            "intermediate_size_mlp": 44,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "floor_scale": 8,
            "attn_scale": 0.5,
            "no_rope_layers": [1, 0, 1, 0],
            "pad_token_id": 0,
        },
    ),
    "falcon-rw": (
        "FalconForCausalLM",
        {
            # "eager" adds the slopes a second time.
            "attention": "sdpa",
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "head_dim": "absent",
            "num_key_value_heads": "absent",
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 101},
    ),
    "mpt": (
        "MptForCausalLM",
        {
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 3,
            "vocab_size": 101,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 1.5},
        },
    ),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {
            **_DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek-v2-lite": (
        "DeepseekV2ForCausalLM",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=0.7,
                mscale_all_dim=1.1,
            ),
        },
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **_DEEPSEEK,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
    ),
    "kimi-k2": (
        "DeepseekV3ForCausalLM",
        {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        {
            **_LATENT,
            "scale_emb": 3.0,
            "scale_depth": 0.7,
            "dim_model_base": 16,
            **_rope(
                "longrope",
                factor=4.0,
                short_factor=[1.0 + 0.1 * i for i in range(4)],
                long_factor=[2.0 + 0.5 * i for i in range(4)],
                original_max_position_embeddings=24,
            ),
        },
    ),
    "qwen3-bias-tied": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
}


def make_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    attention: str = "eager",
    **changes: Any,
) -> transformers.PreTrainedModel:
    """Save a random checkpoint in `folder`; returns the transformers model, the oracle."""
    config = _config(architecture, changes)
    config._attn_implementation = attention
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and weight.dim() == 1:
                weight.copy_(1 + 0.2 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * (1.6 / weight.shape[1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_case(folder: Path, case: str, **changes: Any) -> transformers.PreTrainedModel:
    """`make_checkpoint` of one of `CASES`."""
    architecture, own = CASES[case]
    return make_checkpoint(folder, architecture, **{**own, **changes})
