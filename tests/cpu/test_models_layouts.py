"""Families whose code is not part of transformers: another family's network under other names.

Each checkpoint is made from one that transformers computes, with the names, the stacking and the
config.json of the real one.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.models.llama import BaichuanForCausalLM
from tests.cpu.test_models_parity import assert_close, expected, random_ids
from tests.support.checkpoints import make_case, make_checkpoint
from tests.support.paged import run_all

Tensors = dict[str, Tensor]


def named(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor.contiguous()
    return found


def chatglm(tensors: Tensors) -> Tensors:
    """GLM-4 9B as THUDM published it first."""
    for i in range(3):
        layer = f"model.layers.{i}.self_attn."
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{layer}{n}_proj.{kind}") for n in "qkv"]
            tensors[f"{layer}query_key_value.{kind}"] = torch.cat(parts)
    return named(
        tensors,
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.layers", "transformer.encoder.layers"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("self_attn", "self_attention"),
        ("gate_up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    )


def internlm2(tensors: Tensors) -> Tensors:
    """q, k, v stacked by KV head: 2 groups of 2 query heads of 16."""
    for i in range(3):
        layer = f"model.layers.{i}.self_attn."
        q, k, v = (tensors.pop(f"{layer}{n}_proj.weight") for n in "qkv")
        stacked = torch.cat([part.view(2, -1, 16, part.shape[1]) for part in (q, k, v)], 1)
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = stacked.reshape(-1, q.shape[1])
    return named(
        tensors,
        ("embed_tokens", "tok_embeddings"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("lm_head", "output"),
    )


def baichuan(tensors: Tensors) -> Tensors:
    for i in range(3):
        layer = f"model.layers.{i}.self_attn."
        parts = [tensors.pop(f"{layer}{n}_proj.weight") for n in "qkv"]
        tensors[f"{layer}W_pack.weight"] = torch.cat(parts)
    return tensors


def same(tensors: Tensors) -> Tensors:
    return tensors


GLM = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 44,
    "layernorm_epsilon": 1.5625e-07,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rope_ratio": 1,
    "seq_length": 256,
    "padded_vocab_size": 101,
    "original_rope": True,
    "rmsnorm": True,
    "eos_token_id": [2],
}
BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
MINICPM = {"scale_emb": 3.0, "scale_depth": 0.7, "dim_model_base": 16, "tie_word_embeddings": False}
Case = tuple[str, dict[str, Any], Callable[[Tensors], Tensors], dict[str, Any]]
#: architecture -> (that of transformers, its changes, how to rename, config.json)
CASES: dict[str, Case] = {
    "ChatGLMModel": ("GlmForCausalLM", {"pad_token_id": 0}, chatglm, GLM),
    "InternLM2ForCausalLM": ("LlamaForCausalLM", {}, internlm2, BASE),
    "InternLM3ForCausalLM": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True},
        same,
        BASE | {"qkv_bias": True, "bias": True},
    ),
    "BaichuanForCausalLM": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 4},
        baichuan,
        BASE | {"num_key_value_heads": 4},
    ),
    "MiniCPMForCausalLM": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.7 / 3**0.5,
            "logits_scaling": 2.0,
        },
        same,
        BASE | MINICPM,
    ),
}


def write(folder: Path, architecture: str, changes: dict[str, Any] | None = None) -> Any:
    """Returns the oracle."""
    oracle_of, made, rename, config = CASES[architecture]
    oracle = make_checkpoint(folder, oracle_of, **made)
    path = folder / "model.safetensors"
    save_file(rename(load_file(path)), path)
    config = {"architectures": [architecture], **config, **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    return oracle


@pytest.mark.parametrize("architecture", CASES)
def test_published_layouts(tmp_path: Path, architecture: str) -> None:
    oracle = write(tmp_path, architecture)
    model = load_model(read_model_info(tmp_path), torch.float32, SoloGroup())
    sequences = random_ids(40, 1, 17)
    for ours, ids in zip(run_all(model, sequences), sequences, strict=True):
        assert_close(ours, expected(oracle, ids))


def test_baichuan_13b_has_slopes_instead_of_positions(tmp_path: Path) -> None:
    """Llama at position 0 throughout, with ALiBi in its mask."""
    oracle = write(tmp_path, "BaichuanForCausalLM")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_max_length"] = config.pop("max_position_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = read_model_info(tmp_path)
    assert info.context_length == 256
    model = load_model(info, torch.float32, SoloGroup())
    ids = random_ids(40)[0]
    at = torch.arange(40)
    slopes = torch.tensor([2.0 ** (-2 * head) for head in range(1, 5)])
    mask = slopes[:, None, None] * (at - at[:, None]) + torch.where(at > at[:, None], -1e9, 0.0)
    zeros = torch.zeros(1, 40, dtype=torch.int64)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([ids]), attention_mask=mask[None], position_ids=zeros)
    assert_close(run_all(model, [ids])[0], wanted.logits[0])


def test_baichuan_2_has_rows_of_length_1_in_its_head(tmp_path: Path) -> None:
    write(tmp_path, "BaichuanForCausalLM", {"vocab_size": 125696})
    layout = BaichuanForCausalLM.describe(read_model_info(tmp_path)).layout
    weight = torch.randn(7, 32)
    [(name, made)] = layout.canonical([("lm_head.weight", weight)])
    assert name == "lm_head.weight"
    torch.testing.assert_close(made, weight / weight.norm(dim=1, keepdim=True))


def test_llama4_beside_its_vision_model(tmp_path: Path) -> None:
    oracle = make_case(tmp_path, "llama4")
    path = tmp_path / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, "vision_model.class_embedding": torch.zeros(4)}, path)
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    model = load_model(read_model_info(tmp_path), torch.float32, SoloGroup())
    ids = random_ids(40)[0]
    assert_close(run_all(model, [ids])[0], expected(oracle, ids))


@pytest.mark.parametrize("case", ["deepseek-v3", "glm4-moe"])
def test_layers_that_predict_more_tokens_are_left_out(tmp_path: Path, case: str) -> None:
    make_case(tmp_path, case)
    path = tmp_path / "model.safetensors"
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}
    save_file(load_file(path) | extra, path)
    for count, message in ((1, ""), (0, "unexpected tensor model.layers.3.eh_proj")):
        info = read_model_info(tmp_path, {"num_nextn_predict_layers": count})
        with pytest.raises(LoadError, match=message) if message else nullcontext():
            load_model(info, torch.float32, SoloGroup())


def test_a_stack_of_wrong_size_is_named(tmp_path: Path) -> None:
    write(tmp_path, "InternLM2ForCausalLM", {"num_key_value_heads": 4})
    with pytest.raises(LoadError, match=r"layers\.0\.attention\.wqkv\.weight .* cannot be cut"):
        load_model(read_model_info(tmp_path), torch.float32, SoloGroup())
