"""Vectors and scores against sentence-transformers, on folders that it has written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers import models as modules
from tokenizers import processors

from headrace.core.errors import LoadError
from headrace.core.messages import Delta
from headrace.core.model_info import read_model_info
from headrace.frontend.encode import relevance_of
from headrace.text.tokenizer import load_tokenizer
from tests.support.pooled import build, make_model, pool
from tests.support.tokenizers import backend

TEXTS = [
    "Hello world",
    "the headrace leads water to the wheel",
    "water",
    "mills and wheels and " * 20,
    "Grüße aus München",
    "small text about mills",
]
PAIRS = [("where does water go", text) for text in TEXTS]
TOGETHER: dict[str, Any] = {"max_running_requests": 6}
ALONE: dict[str, Any] = {"max_running_requests": 1, "disable_radix_cache": True}
#: As published models: all-MiniLM-L6, bge-m3 and Qwen3-Embedding-0.6B but for depth and vocabulary
REAL: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
    "xlm-roberta": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
    },
    "qwen3": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save(folder: Path, case: str, **changes: Any) -> transformers.PreTrainedModel:
    """A checkpoint with a tokenizer of its family, padding and templates included."""
    kind, pad, single, pair = {
        "bert": ("word_piece", "[UNK]", "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "xlm": ("metaspace", "<s>", "$A </s>", "$A </s> </s> $B </s>"),
        "qwen": ("byte_level", "<|im_start|>", "$A <|im_end|>", "$A $B <|im_end|>"),
    }[next(family for family in ("bert", "xlm", "qwen") if case.startswith(family))]
    words = backend(kind)
    names = ("[CLS]", "[SEP]", "</s>", "<|im_end|>")
    ids = [(name, words.token_to_id(name)) for name in names if name in words.get_vocab()]
    words.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=ids
    )
    size, pad_id = words.get_vocab_size(), words.token_to_id(pad)
    oracle = make_model(
        folder, case, vocab_size=size, pad_token_id=pad_id, max_position_embeddings=512, **changes
    )
    types = ["token_type_ids"] if kind == "word_piece" else []
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        model_input_names=["input_ids", *types, "attention_mask"],
    )
    fast.save_pretrained(folder)
    return oracle


def check(folder: Path, wanted: np.ndarray) -> None:
    """Cosines with what the oracle says, lengths, and the same bits alone and together."""
    ids = load_tokenizer(folder).encode_batch(TEXTS)
    together = pool(*build(folder, **TOGETHER), ids)
    for got, want in zip(together, wanted.astype(np.float64), strict=True):
        lengths = np.linalg.norm(got.astype(np.float64)), np.linalg.norm(want)
        assert got @ want / np.prod(lengths) >= 1 - 1e-6
        assert abs(lengths[0] / lengths[1] - 1) < 1e-5
    for one, other in zip(pool(*build(folder, **ALONE), ids), together, strict=True):
        assert np.array_equal(one, other)


def dense(inputs: int, outputs: int, **options: Any) -> modules.Dense:
    torch.manual_seed(inputs * outputs)
    return modules.Dense(inputs, outputs, **options)


@pytest.mark.parametrize(
    ("case", "mode", "more"),
    [
        ("bert", "mean", ["normalize"]),
        ("bert", "cls", []),
        ("bert", "max", [dense(32, 20), "normalize"]),
        ("xlm-roberta", "mean_sqrt_len_tokens", []),
        ("xlm-roberta", "cls", [dense(32, 48, bias=False, activation_function=None)]),
        ("qwen3", "lasttoken", ["normalize"]),
        (
            "qwen3",
            "weightedmean",
            [dense(32, 64, activation_function=torch.nn.GELU()), dense(64, 8)],
        ),
        ("qwen3", "mean", ["normalize"]),
    ],
)
def test_embeddings(case: str, mode: Any, more: list[Any], tmp_path: Path) -> None:
    save(tmp_path / "base", case)
    chain = [modules.Normalize() if module == "normalize" else module for module in more]
    model = SentenceTransformer(
        modules=[modules.Transformer(str(tmp_path / "base")), modules.Pooling(32, mode), *chain],
        device="cpu",
    )
    model.save(str(tmp_path / "made"))
    check(tmp_path / "made", model.encode(TEXTS, batch_size=4))
    info = read_model_info(tmp_path / "made")
    assert info.embedding_size == model.get_embedding_dimension()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mode"), [("bert", "mean"), ("xlm-roberta", "cls"), ("qwen3", "lasttoken")]
)
def test_sizes_of_published_models(case: str, mode: Any, tmp_path: Path) -> None:
    save(tmp_path / "base", case, **REAL[case])
    width = int(REAL[case]["hidden_size"])
    model = SentenceTransformer(
        modules=[
            modules.Transformer(str(tmp_path / "base")),
            modules.Pooling(width, mode),
            modules.Normalize(),
        ],
        device="cpu",
    )
    model.save(str(tmp_path / "made"))
    check(tmp_path / "made", model.encode(TEXTS, batch_size=4))


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("bert-cross", {}),
        (
            "bert-cross",
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        ),
        ("bert-classes", {}),
        ("xlm-roberta-cross", {}),
        (
            "xlm-roberta-cross",
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        ),
        ("qwen3-reward", {}),
    ],
)
def test_cross_encoders(case: str, config: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, case)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    wanted = CrossEncoder(str(tmp_path), device="cpu").predict(PAIRS, batch_size=4)
    found = load_tokenizer(tmp_path).encode_pairs(PAIRS)
    ids, seconds = [ids for ids, _ in found], [second for _, second in found]
    info = read_model_info(tmp_path)
    together = pool(*build(tmp_path, **TOGETHER), ids, seconds)
    for vector, want in zip(together, wanted, strict=True):
        scores = relevance_of(Delta("", pooled=vector.tobytes()), info)
        assert np.allclose(scores, want, atol=2e-5)
    alone = pool(*build(tmp_path, **ALONE), ids, seconds)
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda path: _edit(path / "modules.json", lambda m: m.reverse()), "in this order"),
        (lambda path: _edit(path / "modules.json", lambda m: m[2].update(path="../x")), "folder"),
        (
            lambda path: _edit(path / "1_Pooling/config.json", _set("pooling_mode", "median")),
            "median",
        ),
        (
            lambda path: _edit(
                path / "1_Pooling/config.json", _set("pooling_mode", ["cls", "max"])
            ),
            "pooling_mode",
        ),
        (lambda path: _edit(path / "2_Dense/config.json", _set("in_features", 31)), "31"),
        (
            lambda path: _edit(
                path / "2_Dense/config.json", _set("activation_function", "os.system")
            ),
            "activation_function",
        ),
        (lambda path: _edit(path / "2_Dense/config.json", _set("use_residual", True)), "beside"),
        (lambda path: (path / "2_Dense/model.safetensors").unlink(), "safetensors"),
        (lambda path: (path / "2_Dense/config.json").unlink(), "does not exist"),
    ],
)
def test_what_cannot_be_served_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    save(tmp_path / "base", "bert")
    transformer = modules.Transformer(str(tmp_path / "base"))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(32), dense(32, 8)])
    model.save(str(tmp_path / "made"))
    change(tmp_path / "made")
    with pytest.raises(LoadError, match=match):
        build(tmp_path / "made")


def _edit(file: Path, edit: Any) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def _set(key: str, value: Any) -> Any:
    return lambda config: config.update({key: value})
