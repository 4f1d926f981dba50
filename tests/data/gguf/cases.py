"""The models here: which checkpoints of the parity tests, and how they became GGUF files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
VOCABULARY = 320
IDS = np.random.default_rng(5).integers(3, VOCABULARY, 24).tolist()
ROWS = [7, 23]
"""Of which of the ids logits are kept."""


@dataclass(frozen=True)
class GgufCase:
    """`source`: a case of tests.support.checkpoints or of tests.cpu.test_models_layouts.

    `changes` to it, and to its config.json alone. `pieces`: it has a sentencepiece tokenizer, else
    one that cuts words as `pre`. `kinds`: the types of its matrices, a file for each.
    Logits are those of `theirs`, transformers, where llama.cpp's are not the model's: it has no
    SparseMixer, and positions of Baichuan only for its published numbers of layers.
    """

    source: str
    changes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    pieces: bool = False
    pre: str = "llama-bpe"
    kinds: tuple[str, ...] = ("Q4_0",)
    theirs: bool = False

    def __post_init__(self) -> None:
        sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64}
        object.__setattr__(self, "changes", {**sizes, **self.changes})

    def files(self, name: str) -> list[str]:
        """What the files of the model `name` are called."""
        if len(self.kinds) == 1:
            return [name]
        return [f"{name}-{kind.lower()}" for kind in self.kinds]


def old(source: str, **fields: Any) -> GgufCase:
    """Of a configuration without an intermediate size."""
    changes = {"intermediate_size": "absent", **fields.pop("changes", {})}
    return GgufCase(source, changes, **fields)


BLOCKS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
SUPER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TWO = {"num_hidden_layers": 2}
EVEN = {"head_dim": "absent"}
LONG = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 16,
    },
}
SHORT = {
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.5, 1.7, 1.9],
        "long_factor": [1.0, 1.5, 1.7, 1.9],
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": 64,
    },
}
YARN = {
    "rope_type": "yarn",
    # The ramp ends at a whole number with this base: llama.cpp rounds its ends, gpt-oss does not.
    "rope_theta": 487.5325,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
DBRX = {"ffn_hidden_size": 32, "moe_num_experts": 5, "moe_top_k": 2, "hidden_size": 32}
ROUND = {"dtype": torch.bfloat16}
EXPERTS = {"moe_intermediate_size": 32}

MODELS: dict[str, GgufCase] = {
    "llama": GgufCase("llama", TWO, pieces=True),
    "llama3": GgufCase("llama-llama3", TWO),
    "llama-linear": GgufCase("llama-linear", TWO),
    "llama-yarn": GgufCase("llama-yarn", TWO),
    "mixtral": GgufCase("mixtral", TWO, pieces=True),
    "qwen2": GgufCase("qwen2", {**TWO, **EVEN}, pre="qwen2"),
    "qwen3": GgufCase("qwen3", TWO, pre="qwen2"),
    "qwen2moe": GgufCase(
        "qwen2-moe", {**TWO, **EXPERTS, "shared_expert_intermediate_size": 64}, pre="qwen2"
    ),
    "qwen3moe": GgufCase("qwen3-moe", {**TWO, **EXPERTS, "decoder_sparse_step": 1}, pre="qwen2"),
    "gemma": GgufCase("gemma", TWO, pieces=True),
    "gemma2": GgufCase("gemma2", {**TWO, "query_pre_attn_scalar": 16}, pieces=True),
    "gemma3": GgufCase(
        "gemma3",
        {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 16},
        pieces=True,
    ),
    "phi2": GgufCase("phi-plain", {**TWO, "num_key_value_heads": 4, "intermediate_size": 128}),
    "phi3": GgufCase(
        "phi3",
        {**TWO, "sliding_window": None},
        {"original_max_position_embeddings": 256},
        pieces=True,
    ),
    "phi3-long": GgufCase("phi3-partial", {**TWO, **LONG}, pieces=True),
    "phimoe": GgufCase(
        "phimoe",
        {**TWO, **EVEN, "intermediate_size": 32, "router_jitter_noise": 0.01, **SHORT, **ROUND},
        {"architectures": ["PhiMoEForCausalLM"]},
        pieces=True,
        kinds=("BF16",),
        theirs=True,
    ),
    "glm4": GgufCase("glm4", TWO, pre="glm4"),
    "chatglm": GgufCase("glm", {**TWO, "head_dim": 8}, pre="chatglm-bpe"),
    "glm4moe": GgufCase("glm4-moe", EXPERTS, pre="glm4"),
    "olmo": GgufCase("olmo", TWO, pre="olmo"),
    "olmo2": GgufCase("olmo2", TWO, pre="dbrx"),
    "olmo3": GgufCase("olmo3", {"num_hidden_layers": 4, "layer_types": None}, pre="dbrx"),
    "olmoe": GgufCase(
        "olmoe", {**TWO, "num_experts": 6, "num_key_value_heads": 4, "clip_qkv": None}, pre="olmo"
    ),
    "granite": GgufCase("granite", {**TWO, **EVEN}, pre="refact"),
    "granitemoe": GgufCase("granite-moe", TWO, pre="refact"),
    "starcoder2": GgufCase("starcoder2", {**TWO, "sliding_window": None}, pre="starcoder"),
    "stablelm": GgufCase("stablelm", TWO, pre="stablelm2"),
    "stablelm-parallel": GgufCase(
        "stablelm-parallel", {**TWO, "qk_layernorm": False}, pre="stablelm2"
    ),
    "gpt2": old("gpt2", changes={"n_layer": 2}, config={"n_ctx": 256}, pre="gpt-2"),
    "gptneox": GgufCase("neox", TWO, {"rotary_pct": 0.25}, pre="olmo"),
    "gptneox-serial": GgufCase(
        "neox-serial", {**TWO, "attention_bias": True}, {"rotary_pct": 0.25}, pre="olmo"
    ),
    "falcon": old("falcon-7b", changes=TWO, config={"num_kv_heads": 1}, pre="falcon"),
    "falcon-40b": old("falcon-40b", changes=TWO, pre="falcon"),
    "command-r": GgufCase("cohere", {**TWO, "use_qk_norm": False}, pre="command-r"),
    "cohere2": GgufCase(
        "cohere2",
        {"num_hidden_layers": 4, "layer_types": None, **EVEN},
        {"rotary_pct": 1.0},
        pre="command-r",
    ),
    "bloom": old("bloom", changes={"n_layer": 2}, pre="bloom"),
    "mpt": old(
        "mpt", changes={"n_layers": 2}, config={"architectures": ["MPTForCausalLM"]}, pre="mpt"
    ),
    "dbrx": old("dbrx", changes={"n_layers": 2, "ffn_config": DBRX}, pre="dbrx"),
    "internlm2": GgufCase(
        "InternLM2ForCausalLM",
        {"hidden_size": 64},
        {"bos_token_id": 1, "eos_token_id": 2},
        pieces=True,
    ),
    "internlm3": GgufCase("InternLM3ForCausalLM", pieces=True),
    "baichuan": GgufCase(
        "BaichuanForCausalLM", {"head_dim": 8}, pieces=True, kinds=("F32",), theirs=True
    ),
    "minicpm": GgufCase("MiniCPMForCausalLM", pieces=True),
    "minicpm3": GgufCase(
        "minicpm3",
        {
            **TWO,
            "v_head_dim": 8,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "rope_parameters": None,
        },
        pieces=True,
    ),
    "nemotron": GgufCase("nemotron", {**TWO, **EVEN}, pieces=True),
    "exaone4": GgufCase(
        "exaone4-full", {**TWO, **EVEN, "layer_types": ["full_attention"] * 2}, pre="exaone4"
    ),
    "smollm3": GgufCase(
        "smollm3", {"num_hidden_layers": 4, "no_rope_layers": None}, pre="smaug-bpe"
    ),
    "arcee": GgufCase("arcee", {**TWO, "mlp_bias": False}),
    "ernie4_5": GgufCase("ernie", {**TWO, "use_bias": False}, pieces=True),
    "ernie4_5-moe": GgufCase("ernie-moe", {**TWO, **EXPERTS}, pieces=True),
    "deepseek2": GgufCase(
        "deepseek-v3",
        {**TWO, **EXPERTS, "attention_bias": False},
        {"scoring_func": "sigmoid"},
        pre="deepseek-v3",
    ),
    "deepseek2-v2": GgufCase(
        "deepseek-v2",
        {**TWO, **EXPERTS, "topk_method": "greedy", "n_group": None, "topk_group": None},
        pre="deepseek-llm",
    ),
    "gpt-oss": GgufCase(
        "gpt-oss",
        {**TWO, "num_experts_per_tok": 5, "swiglu_limit": 7.0, "rope_parameters": YARN},
        pre="gpt-4o",
        kinds=("Q4_0", "MXFP4"),
    ),
    "llama4": GgufCase(
        "llama4",
        {
            "intermediate_size": 32,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "no_rope_layers": [1, 1, 1, 0],
        },
        pre="llama4",
    ),
    "minimax-m2": GgufCase("minimax-m2", TWO, {"scoring_func": "sigmoid"}, pre="minimax-m2"),
    "blocks": GgufCase("llama", {"num_hidden_layers": 1}, pieces=True, kinds=BLOCKS),
    "super": GgufCase(
        "qwen3",
        {"num_hidden_layers": 1, "hidden_size": 256, "tie_word_embeddings": True},
        pre="qwen2",
        kinds=SUPER,
    ),
}
