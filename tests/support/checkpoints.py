"""Tiny random checkpoints of each architecture, made by transformers.

Weights are drawn wide enough that attention is far from uniform, so that a wrong mask, rotation or
head mapping shows in the logits. `CASES` are the configurations that every path is tested on.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

_CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}

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
    "qwen3-bias-tied": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
}


def make_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **changes: Any,
) -> transformers.PreTrainedModel:
    """Save a random checkpoint in `folder`; returns the transformers model, the oracle."""
    config = _CONFIGS[architecture](**{**_TINY, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif weight.dim() == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * (1.6 / weight.shape[1] ** 0.5))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_case(folder: Path, case: str, **changes: Any) -> transformers.PreTrainedModel:
    """`make_checkpoint` of one of `CASES`."""
    architecture, own = CASES[case]
    return make_checkpoint(folder, architecture, **{**own, **changes})
