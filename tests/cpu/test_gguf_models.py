"""Models from one GGUF file: logits of the checkpoint it was made of."""

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.loader.files import resolve_model_path
from headrace.text.tokenizer import load_tokenizer
from tests.cpu.test_models_parity import assert_close, expected, random_ids
from tests.support.checkpoints import make_case
from tests.support.paged import run_all

CASES = {
    "llama": "llama",
    "llama-mqa": "llama",
    "llama-tied": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3moe",
}
NAMES = (
    (r"^model\.embed_tokens\.", "token_embd."),
    (r"^model\.norm\.", "output_norm."),
    (r"^lm_head\.", "output."),
    (r"^model\.layers\.(\d+)\.", r"blk.\1."),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.(\w)_proj", r"attn_\1"),
    (r"self_attn\.(\w)_norm", r"attn_\1_norm"),
    (r"attn_o\.", "attn_output."),
    (r"mlp\.gate\.", "ffn_gate_inp."),
    (r"mlp\.experts\.(\w+)_proj", r"ffn_\1_exps.weight"),
    (r"mlp\.(\w+)_proj", r"ffn_\1"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def turned(values: Tensor, heads: int) -> Tensor:
    """Rows of q and k as llama.cpp's converter orders them."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(path: Path, oracle: transformers.PreTrainedModel, architecture: str) -> None:
    config = oracle.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*"abcdefgh", "ab", *(f"t{i}" for i in range(90)), "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 99 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(100)
    writer.add_chat_template("{{ messages[0].content }}")
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, values in split_experts(oracle.state_dict()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (found := re.search(r"self_attn\.([qk])_proj", name)):
            query = found[1] == "q"
            values = turned(
                values, config.num_attention_heads if query else config.num_key_value_heads
            )
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_experts(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, values in state.items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), values.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up", part), half.contiguous()
        else:
            yield name, values


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_checkpoint(tmp_path: Path, case: str) -> None:
    every = {"decoder_sparse_step": 1} if case == "qwen3-moe" else {}
    oracle = make_case(tmp_path / "hf", case, **every)
    write(tmp_path / "m.gguf", oracle, CASES[case])
    info = read_model_info(resolve_model_path(str(tmp_path / "m.gguf")))
    model = load_model(info, torch.float32, SoloGroup())
    sequences = random_ids(33, 4)
    for ours, ids in zip(run_all(model, sequences), sequences, strict=True):
        assert_close(ours, expected(oracle, ids))


def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    """That the test writes files as llama.cpp does: transformers' reader knows no test of ours."""
    oracle = make_case(tmp_path / "hf", "llama", head_dim=8)
    write(tmp_path / "m.gguf", oracle, "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = random_ids(20)[0]
    assert_close(expected(theirs, ids), expected(oracle, ids))


def test_tokenizer_and_template(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make_case(tmp_path / "hf", "qwen3"), "qwen3")
    folder = resolve_model_path(str(tmp_path / "m.gguf"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("abc</s>") == [8, 2, 100]
    assert read_model_info(folder).eos_token_ids == (100,)
    assert resolve_model_path(str(tmp_path / "m.gguf")) == folder


def test_unknown_architectures_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make_case(tmp_path / "hf", "qwen3"), "mamba")
    with pytest.raises(LoadError, match="'mamba' is not supported; known: llama"):
        resolve_model_path(str(tmp_path / "m.gguf"))
