"""GGUF files that llama.cpp's converter and quantizer wrote: its logits, and its tokens.

tests/data/gguf/make.py made the files, and had llama.cpp itself compute what is expected.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.loader.files import resolve_model_path
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_config import config_of
from headrace.loader.gguf_families import FAMILIES
from headrace.loader.gguf_tokenizer import tokenizer_of
from headrace.loader.gguf_words import WORDS
from headrace.quant.dense import ON_LOAD
from tests.data.gguf.cases import HERE, IDS, MODELS, ROWS
from tests.data.gguf.texts import FRAMED, TEXTS
from tests.support.paged import run_all

FILES = [file for name, case in MODELS.items() for file in case.files(name)]
KEPT = [file for name, case in MODELS.items() if len(case.kinds) > 1 for file in case.files(name)]
FUSED = ["phi3", "glm4", "chatglm", "gpt2", "falcon", "bloom", "qwen3moe", "deepseek2", "llama4"]
GELU = {"gemma", "gemma2", "gemma3", "phi2", "starcoder2", "gpt2", "gptneox", "gptneox-serial",
        "falcon", "falcon-40b", "bloom", "mpt"}  # fmt: skip
# llama.cpp takes letters without marks for words here, the published tokenizers with them.
MARKS = {"tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "logits.npz"))


def logits(name: str, quantization: str = "none") -> Tensor:
    """fp32 [ids, vocabulary]."""
    info = read_model_info(resolve_model_path(str(HERE / f"{name}.gguf")))
    model = load_model(info, torch.float32, SoloGroup(), quantization=quantization)
    return run_all(model, [IDS])[0]


def divergence(one: Tensor, other: Tensor) -> float:
    one, other = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_same_numbers(
    name: str, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widened, as llama.cpp computed with the file widened: fp32 on both sides, and the token that
    follows each id the same.

    A few times what sums of fp32 in another order differ by. llama.cpp looks GELU up in a table of
    fp16, whose steps of 2^-11 the layers behind it multiply.
    """
    monkeypatch.setitem(ON_LOAD, "int8", ON_LOAD["none"])
    ours, theirs = logits(name, "int8"), torch.from_numpy(expected[name])
    unit = float(theirs.std())
    difference = float((ours[ROWS] - theirs).abs().max())
    assert difference < (2**-6 if name in GELU else 1e-4) * unit
    assert ours.argmax(-1).tolist() == expected[f"{name}/top"].tolist()


@pytest.mark.parametrize("name", KEPT)
def test_kept_blocks_are_as_close_as_llama_cpps(name: str, expected: dict[str, np.ndarray]) -> None:
    """Both kernels round activations to 8 bits, each in its own way: ours lies no further from the
    numbers of the file than llama.cpp's, and from that no further than both errors together (the
    root of the divergence adds up like a distance)."""
    exact, kernels = (torch.from_numpy(expected[f"{name}{of}"]) for of in ("", "/kernels"))
    ours = logits(name)[ROWS]
    own, theirs = divergence(exact, ours), divergence(exact, kernels)
    assert own < 2 * theirs + 1e-9
    assert divergence(kernels, ours) ** 0.5 < 1.1 * (own**0.5 + theirs**0.5)


@pytest.mark.parametrize("name", FUSED)
def test_stacked_matrices_are_kept(name: str, expected: dict[str, np.ndarray]) -> None:
    assert divergence(torch.from_numpy(expected[name]), logits(name)[ROWS]) < 0.02


def test_every_architecture_is_here() -> None:
    files = [GgufFile(HERE / f"{name}.gguf") for name in FILES]
    assert {file.metadata["general.architecture"] for file in files} == set(FAMILIES)


def read(name: str, **metadata: Any) -> Tokenizer:
    file = GgufFile(HERE / f"{name}.gguf")
    file.metadata.update({key.replace("__", "."): value for key, value in metadata.items()})
    return Tokenizer.from_str(json.dumps(tokenizer_of(file)[0]))


def check(tokenizer: Tokenizer, name: str, *, composed: bool = False) -> None:
    every = json.loads((HERE / "tokens.json").read_text())
    ids = every[every[name] if isinstance(every[name], str) else name]
    for index, (text, wanted) in enumerate(zip(TEXTS + TEXTS[:FRAMED], ids, strict=True)):
        # llama.cpp leaves NFC to whoever calls it.
        if composed and unicodedata.normalize("NFC", text) != text:
            continue
        if name in MARKS and any(unicodedata.category(char) == "Mc" for char in text):
            continue
        found = tokenizer.encode(text, add_special_tokens=index >= len(TEXTS)).ids
        assert found == wanted, text


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_alike(pre: str) -> None:
    check(read("bpe", tokenizer__ggml__pre=pre), pre, composed=WORDS[pre].composed)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("llama", {}),
        ("gemma", {"tokenizer__ggml__add_space_prefix": False}),
        ("phi-3", {"general__name": "Phi-3-mini"}),
    ],
)
def test_pieces_are_merged_alike(name: str, metadata: dict[str, Any]) -> None:
    check(read("pieces", **metadata), name)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer__ggml__model", "rwkv", "kind 'rwkv' are not supported; known: gpt2, llama"),
        ("tokenizer__ggml__pre", "kimi-k9", "cut as 'kimi-k9' are not supported; known: default"),
        ("tokenizer__ggml__token_type", [1], "tokens and their types do not fit"),
    ],
)
def test_unknown_tokenizers_are_named(key: str, value: object, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read("bpe", **{key: value})


def test_the_end_of_a_turn_ends_a_text() -> None:
    """Gemma's file has an end of text and, as llama.cpp's converter says, 107 for a turn's."""
    assert config_of(GgufFile(HERE / "gemma.gguf"))["eos_token_id"] == [2, 107]


def test_one_file_of_several_is_named() -> None:
    file = GgufFile(HERE / "llama.gguf")
    file.metadata["split.count"] = 3
    with pytest.raises(LoadError, match=r"llama\.gguf is one of 3 files"):
        config_of(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count_kv", [2, 2]),
        ("block_count", "two"),
        ("rope.freq_base", True),
        ("expert_count", -1),
        ("attention.sliding_window_pattern", [True]),
    ],
)
def test_fields_that_cannot_be_are_named(field: str, value: object) -> None:
    file = GgufFile(HERE / "gpt-oss-q4_0.gguf")
    file.metadata[f"gpt-oss.{field}"] = value
    with pytest.raises(LoadError, match=field):
        config_of(file)
