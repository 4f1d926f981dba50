"""transformers' implementations over our cache: the logits that transformers alone gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.models import Model, borrowed
from tests.cpu.test_models_parity import assert_close, expected, incremental, random_ids
from tests.support.checkpoints import make_checkpoint
from tests.support.paged import PagedRun, run_all

LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": "absent",
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**LATENT, "n_group": 2, "topk_group": 1}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": 9, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    ),
    "phimoe": (
        "PhimoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": "absent"},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, model_impl: str = "transformers", **fields: Any) -> Model:
    info = read_model_info(folder)
    return load_model(info, torch.float32, SoloGroup(), model_impl=model_impl, **fields)


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    architecture, changes = CASES[request.param]
    oracle = make_checkpoint(folder, architecture, **changes)
    return load(folder), oracle


@torch.inference_mode()
def test_whole_prompts(pair: tuple[Model, transformers.PreTrainedModel]) -> None:
    model, oracle = pair
    sequences = random_ids(40, 1, 17)
    for ours, ids in zip(run_all(model, sequences), sequences, strict=True):
        assert_close(ours, expected(oracle, ids))


@torch.inference_mode()
def test_chunks_then_decode(pair: tuple[Model, transformers.PreTrainedModel]) -> None:
    model, oracle = pair
    ids = random_ids(30, seed=2)[0]
    run = PagedRun(model, [ids], prompt_lens=[25])
    ours = [run.step([(0, count)])[0] for count in (10, 15, 1, 1, 1, 1, 1)]
    assert_close(torch.cat(ours), incremental(oracle, ids, 25))


def test_auto_takes_ours_where_there_is_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Qwen3ForCausalLM")
    assert type(load(tmp_path, "auto")).__name__ == "Qwen3ForCausalLM"
    assert borrowed("JetMoeForCausalLM") and not borrowed("NobodyForCausalLM")


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "LlamaForCausalLM")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NobodyForCausalLM"))
    with pytest.raises(LoadError, match="known neither here nor to transformers"):
        load(tmp_path, "transformers")
    for chosen in ("auto", "headrace"):
        with pytest.raises(LoadError, match="is not supported; close to it"):
            load(tmp_path, chosen)


def test_other_files_than_safetensors_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Qwen3ForCausalLM")
    info = read_model_info(tmp_path)
    for load_format in ("pt", "dummy", "layered"):
        with pytest.raises(LoadError, match=f"not format {load_format}"):
            load_model(info, torch.float32, SoloGroup(), load_format, model_impl="transformers")
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        load(tmp_path)


def test_layers_without_keys_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4, num_attention_heads=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="0 of 2 layers"):
        load(tmp_path)
