"""Folders in Mistral's own form (params.json, consolidated.safetensors, tekken.json)."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.loader.files import MISTRAL, resolve_model_path, weight_files
from headrace.loader.tekken import tokenizer_of
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.cpu.test_load_formats import IDS, logits
from tests.support.checkpoints import make_case
from tests.support.quantized import fp8_tensor, rewrite


def as_mistral(source: Path, target: Path, case: str) -> None:
    """A checkpoint of transformers with the names, rows and params.json of Mistral."""
    config = json.loads((source / "config.json").read_text())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], 16
    short = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    short |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    native = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else kv
            halves = tensor.view(count, 2, dim // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        for theirs, ours in (
            ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("model.", ""),
            ("self_attn", "attention"), ("block_sparse_moe", "feed_forward"),
            ("mlp", "feed_forward"), ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"), ("weight_scale", "qscale_weight"),
            ("input_scale", "qscale_act"), *short.items(),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        native[name] = tensor
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": dim,
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": kv,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
    }
    if "quantization_config" in config:
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    if case == "mixtral":
        params["moe"] = {"num_experts": 5, "num_experts_per_tok": 2}
    target.mkdir()
    safetensors.torch.save_file(native, target / "consolidated.safetensors")
    (target / "params.json").write_text(json.dumps(params))


def native_logits(folder: Path, ids: list[int]) -> Tensor:
    """Mistral's network as its paper has it: neighbors of a head turn as complex numbers."""
    w = safetensors.torch.load_file(folder / "consolidated.safetensors")
    p = json.loads((folder / "params.json").read_text())
    dim, heads, kv = p["head_dim"], p["n_heads"], p["n_kv_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + p["norm_eps"]).rsqrt() * w[f"{name}.weight"]

    angles = torch.outer(
        torch.arange(len(ids)).float(),
        p["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim),
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x: Tensor, count: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(len(ids), count, dim // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(p["n_layers"]):
        base = f"layers.{i}."
        y = norm(x, f"{base}attention_norm")
        q, k, v = (y @ w[f"{base}attention.w{c}.weight"].T for c in "qkv")
        k = turned(k, kv).repeat_interleave(heads // kv, 1)
        v = v.view(len(ids), kv, dim).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("ihd,jhd->hij", turned(q, heads), k) * dim**-0.5 + mask
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{base}attention.wo.weight"].T
        y = norm(x, f"{base}ffn_norm")
        gate, up = (y @ w[f"{base}feed_forward.w{c}.weight"].T for c in "13")
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{base}feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("case", ["mistral", "mixtral"])
def test_mistral_folders_load(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_case(tmp_path / "usual", case, rope_theta=10000.0)
    as_mistral(tmp_path / "usual", tmp_path / "native", case)
    folder = resolve_model_path(str(tmp_path / "native"))
    assert resolve_model_path(str(tmp_path / "native")) == folder
    found = logits(folder)
    assert torch.equal(found, logits(tmp_path / "usual"))
    if case == "mistral":
        expected = native_logits(tmp_path / "native", IDS[0])
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
    # A folder with both is read as it is asked for.
    for path in (tmp_path / "usual").iterdir():
        (tmp_path / "native" / path.name).write_bytes(path.read_bytes())
    assert resolve_model_path(str(tmp_path / "native")) == tmp_path / "native"
    both = resolve_model_path(str(tmp_path / "native"), load_format="mistral")
    assert both.parent == folder.parent
    assert weight_files(tmp_path / "native", MISTRAL).paths[0].name == "consolidated.safetensors"
    assert torch.equal(logits(both, "mistral"), found)


def test_mistral_folders_of_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_case(tmp_path / "usual", "mistral", rope_theta=10000.0)
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    rewrite(tmp_path / "usual", config, fp8_tensor(static=True))
    as_mistral(tmp_path / "usual", tmp_path / "native", "mistral")
    native = resolve_model_path(str(tmp_path / "native"))
    assert torch.equal(logits(native), logits(tmp_path / "usual"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("[]", "holds list"),
        ("{", "cannot be read"),
        ('{"dim": 4}', "n_layers must be a positive integer"),
        ('{"dim": "4"}', "dim must be"),
        ('{"quantization": {"qformat_weight": "int4"}}', "qformat_weight must be fp8_e4m3"),
        ('{"dim": 4, "vision_encoder": {"a": 1}}', "vision_encoder.* not supported"),
    ],
)
def test_bad_params_are_refused(
    tmp_path: Path, params: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "params.json").write_text(params)
    with pytest.raises(LoadError, match=message):
        resolve_model_path(str(tmp_path))


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MERGED = ["he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "th", "the", " the",
           "in", "ing", "é", "日", "日本", "  ", "an", "and", " a", " and"]  # fmt: skip


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """A small vocabulary: ours, and tiktoken's of the same ranks."""
    folder = tmp_path_factory.mktemp("tekken")
    words = [bytes([i]) for i in range(256)] + [word.encode() for word in _MERGED]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for i, word in enumerate([*words, b"beyond"])
    ]
    config = {
        "pattern": _WORDS,
        "default_vocab_size": len(words) + 30,
        "default_num_special_tokens": 30,
    }
    made, own = tokenizer_of({"config": config, "vocab": vocab}, folder)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    ranks = {word: i for i, word in enumerate(words)}
    oracle = tiktoken.Encoding("x", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})
    return load_tokenizer(folder), oracle


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="helo wrdthing and日本é1 \n.!/", max_size=40) | st.text(max_size=20))
def test_tekken_splits_text_as_tiktoken_does(
    tekken: tuple[Tokenizer, tiktoken.Encoding], text: str
) -> None:
    tokenizer, oracle = tekken
    if any(name in text for name in ("<s>", "</s>", "[INST]")):
        return
    expected = [1] + [30 + i for i in oracle.encode_ordinary(text)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected[1:]) == text


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": None},
        {"config": {}},
        {"vocab": [{"rank": 0, "token_bytes": "!"}]},
        {"vocab": [{"rank": 0, "token_bytes": "YQ=="}]},
        {"special_tokens": [{"rank": 99, "token_str": "x"}]},
    ],
)
def test_bad_vocabularies_are_refused(change: dict[str, Any]) -> None:
    config = {"pattern": "a", "default_vocab_size": 300, "default_num_special_tokens": 20}
    with pytest.raises(LoadError, match=r"tekken\.json"):
        tokenizer_of({"config": config, "vocab": [], **change}, Path("tekken.json"))
