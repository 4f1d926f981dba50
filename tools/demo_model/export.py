"""Writes the checkpoint in Hugging Face form: config.json, generation_config.json, bf16 weights.

Invariant: the file holds each tensor once (the output head is the embedding), so it loads with
tie_word_embeddings in any runtime that knows LlamaForCausalLM.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from .tokenizer import CONTEXT, VOCAB_SIZE

END_OF_TEXT_ID, TURN_END_ID = 0, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": TURN_END_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
GENERATION = {
    "bos_token_id": None,
    "eos_token_id": [TURN_END_ID, END_OF_TEXT_ID],
    "pad_token_id": END_OF_TEXT_ID,
    "do_sample": False,
    "max_new_tokens": 200,
}


def llama_config() -> LlamaConfig:
    return LlamaConfig(**CONFIG)


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights and configs beside the tokenizer files in `folder`."""
    tensors = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    for name, values in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
