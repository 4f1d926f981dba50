"""Vectors and scores against sentence-transformers, on folders that it has written."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
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
#: The sizes of all-MiniLM-L6, multilingual-e5-base and Qwen3-Embedding-0.6B, but for the vocabulary
#: and, of the latter two, the depth.
REAL: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
    "xlm-roberta": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
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


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    """The library, whose import takes so long that it must not happen at collection."""
    return importlib.import_module("sentence_transformers")


def save(folder: Path, case: str, **changes: Any) -> None:
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
    make_model(
        folder, case, vocab_size=size, pad_token_id=pad_id, max_position_embeddings=512, **changes
    )
    types = ["token_type_ids"] if kind == "word_piece" else []
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        model_input_names=["input_ids", *types, "attention_mask"],
    )
    fast.save_pretrained(folder)


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


def make(
    oracle: ModuleType, folder: Path, width: int, mode: str, more: list[dict[str, Any]]
) -> Any:
    """A SentenceTransformer of folder/base, saved in folder/made; `more`: its Dense modules.

    An empty dict stands for Normalize.
    """
    torch.manual_seed(0)
    kinds = importlib.import_module("sentence_transformers.models")
    chain = [kinds.Dense(**options) if options else kinds.Normalize() for options in more]
    transformer = kinds.Transformer(str(folder / "base"))
    model = oracle.SentenceTransformer(
        modules=[transformer, kinds.Pooling(width, mode), *chain], device="cpu"
    )
    model.save(str(folder / "made"))
    return model


NORMALIZE: dict[str, Any] = {}


def dense(inputs: int, outputs: int, **options: Any) -> dict[str, Any]:
    return {"in_features": inputs, "out_features": outputs, **options}


@pytest.mark.parametrize(
    ("case", "mode", "more"),
    [
        ("bert", "mean", [NORMALIZE]),
        ("bert", "cls", []),
        ("bert", "max", [dense(32, 20), NORMALIZE]),
        ("xlm-roberta", "mean_sqrt_len_tokens", []),
        ("xlm-roberta", "cls", [dense(32, 48, bias=False, activation_function=None)]),
        ("qwen3", "lasttoken", [NORMALIZE]),
        (
            "qwen3",
            "weightedmean",
            [dense(32, 64, activation_function=torch.nn.GELU()), dense(64, 8)],
        ),
        ("qwen3", "mean", [NORMALIZE]),
    ],
)
def test_embeddings(
    oracle: ModuleType, case: str, mode: str, more: list[dict[str, Any]], tmp_path: Path
) -> None:
    save(tmp_path / "base", case)
    model = make(oracle, tmp_path, 32, mode, more)
    check(tmp_path / "made", model.encode(TEXTS, batch_size=4))
    info = read_model_info(tmp_path / "made")
    assert info.embedding_size == model.get_embedding_dimension()


def test_dense_modules_survive_the_weight_cache(oracle: ModuleType, tmp_path: Path) -> None:
    save(tmp_path / "base", "bert")
    make(oracle, tmp_path, 32, "mean", [dense(32, 8)])
    options = {"weight_cache": str(tmp_path / "cache")}
    ids = load_tokenizer(tmp_path / "made").encode_batch(TEXTS)
    first, second = (pool(*build(tmp_path / "made", **options), ids) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # Other weights of a module are other weights.
    make(oracle, tmp_path, 32, "mean", [dense(32, 8, bias=False)])
    third = pool(*build(tmp_path / "made", **options), ids)
    assert not np.allclose(first[0], third[0], atol=1e-3)


@pytest.mark.parametrize(
    ("case", "mode"), [("bert", "mean"), ("xlm-roberta", "cls"), ("qwen3", "lasttoken")]
)
def test_sizes_of_published_models(
    oracle: ModuleType, case: str, mode: str, tmp_path: Path
) -> None:
    save(tmp_path / "base", case, **REAL[case])
    model = make(oracle, tmp_path, int(REAL[case]["hidden_size"]), mode, [NORMALIZE])
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
def test_cross_encoders(
    oracle: ModuleType, case: str, config: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, case)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    wanted = oracle.CrossEncoder(str(tmp_path), device="cpu").predict(PAIRS, batch_size=4)
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
def test_what_cannot_be_served_is_refused(
    oracle: ModuleType, change: Any, match: str, tmp_path: Path
) -> None:
    save(tmp_path / "base", "bert")
    make(oracle, tmp_path, 32, "mean", [dense(32, 8)])
    change(tmp_path / "made")
    with pytest.raises(LoadError, match=match):
        build(tmp_path / "made")


def _edit(file: Path, edit: Any) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def _set(key: str, value: Any) -> Any:
    return lambda config: config.update({key: value})
