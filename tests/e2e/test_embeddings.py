"""Embeddings, classes and rankings over HTTP: official clients, oracles of transformers."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, processors

from headrace.assets import demo_model_path
from headrace.core.errors import BadRequest
from headrace.engine.engine import Engine
from headrace.engine.runtime import Runtime
from headrace.frontend.scoring import INSTRUCT
from tests.support.pooled import make_model, write_modules
from tests.support.tokenizers import backend

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world",
    "the wheel turns the stone",
    "water",
    "a " * 70,
    "mills and wheels and mills",
]
QUERY = "water wheels"
HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS: dict[str, Any] = {"max_running_requests": 8, "max_total_tokens": 4096, "threads": 1}


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT, with token types for pairs."""
    words = backend("word_piece")
    ids = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return words


def save(folder: Path, words: tokenizers.Tokenizer, case: str, **changes: Any) -> Any:
    """A checkpoint with this tokenizer; returns the oracle."""
    oracle = make_model(folder, case, vocab_size=words.get_vocab_size(), **changes)
    words.save(str(folder / "tokenizer.json"))
    return oracle


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runtime, Any, Any]]:
    folder = tmp_path_factory.mktemp("embedder")
    words = word_pieces()
    oracle = save(folder, words, "bert")
    write_modules(folder, "mean_tokens")
    with Runtime(model_path=str(folder), served_model_name="tiny", **OPTIONS) as runtime:
        yield runtime, oracle, words


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runtime, Any, Any]]:
    """A model that says yes or no, as Qwen3-Reranker."""
    folder = tmp_path_factory.mktemp("reranker")
    words = backend("byte_level")
    words.add_tokens([AddedToken("yes", normalized=False), AddedToken("no", normalized=False)])
    oracle = save(folder, words, "qwen3-causal", max_position_embeddings=512)
    with Runtime(model_path=str(folder), **OPTIONS) as runtime:
        yield runtime, oracle, words


def want_vector(oracle: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        mean = oracle(torch.tensor([ids])).last_hidden_state[0].mean(0)
    return torch.nn.functional.normalize(mean, dim=0).numpy()


def next_logits(oracle: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([ids])).logits[0, -1]


def test_openai_embeddings(embedder: tuple[Runtime, Any, Any]) -> None:
    runtime, oracle, words = embedder
    client = openai.OpenAI(base_url=f"{runtime.url}/v1", api_key="x", max_retries=0)
    ids = [words.encode(text).ids for text in TEXTS]
    want = [want_vector(oracle, item) for item in ids]
    # The client asks for base64 unless told otherwise.
    for answer in (
        client.embeddings.create(model="tiny", input=TEXTS),
        client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float"),
        client.embeddings.create(model="tiny", input=ids),
    ):
        assert [item.index for item in answer.data] == list(range(len(TEXTS)))
        for item, vector in zip(answer.data, want, strict=True):
            assert np.dot(item.embedding, vector) >= 1 - 1e-6
        assert answer.usage.prompt_tokens == sum(map(len, ids)) == answer.usage.total_tokens
    alone = [client.embeddings.create(model="tiny", input=text).data[0] for text in TEXTS]
    together = client.embeddings.create(model="tiny", input=TEXTS)
    assert [item.embedding for item in alone] == [item.embedding for item in together.data]
    short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8).data[0].embedding
    cut = want[0][:8] / np.linalg.norm(want[0][:8])
    assert len(short) == 8 and np.allclose(short, cut, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": 33}, "dimensions"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input"),
        ("/v1/embeddings", {"input": [[100000]]}, "input_ids"),
        ("/v1/embeddings", {"input": "a " * 300}, "input_ids"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": {"image": "a"}}, "input"),
        ("/encode", {"text": "a", "input_ids": [1]}, "text"),
        ("/encode", {"text": [["a", "b", "c"]]}, "text"),
        ("/classify", {"text": "a"}, "model"),
        ("/v1/classify", {"input": "a"}, "model"),
        ("/v1/score", {"query": "a", "items": ["b"]}, "model"),
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/generate", {"text": "a"}, "model"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
    ],
)
def test_wrong_bodies(
    embedder: tuple[Runtime, Any, Any], path: str, body: dict[str, Any], field: str
) -> None:
    answer = httpx.post(embedder[0].url + path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"] or field == "input_ids"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 5}),
        ("/api/chat", {"messages": HELLO}),
        ("/api/generate", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/generate", {"input_ids": [5, 6], "stream": True}),
    ],
)
def test_every_route_that_generates_refuses(
    embedder: tuple[Runtime, Any, Any], path: str, body: dict[str, Any]
) -> None:
    answer = httpx.post(embedder[0].url + path, json={"model": "tiny"} | body)
    assert answer.status_code == 400, answer.text
    assert "makes embeddings; ask it through /v1/embeddings" in answer.text


def test_native_ollama_and_ranking_by_cosine(embedder: tuple[Runtime, Any, Any]) -> None:
    runtime, oracle, words = embedder
    assert runtime.get_model_info()["is_generation"] is False
    assert httpx.get(runtime.url + "/health_generate").status_code == 200
    one = runtime.encode(TEXTS[0], rid="r1")
    want = want_vector(oracle, words.encode(TEXTS[0]).ids)
    assert np.dot(one["embedding"], want) >= 1 - 1e-6
    assert one["meta_info"]["id"] == "r1"
    assert one["meta_info"]["prompt_tokens"] == len(words.encode(TEXTS[0]).ids)
    many = runtime.encode(input_ids=[[3, 4], [5]], dimensions=4)
    assert [len(item["embedding"]) for item in many] == [4, 4]
    client = ollama.Client(host=runtime.url)
    found = client.embed("tiny", input=[TEXTS[0], "word " * 900])
    assert np.allclose(found.embeddings[0], one["embedding"], atol=1e-7)
    assert found.prompt_eval_count == len(words.encode(TEXTS[0]).ids) + 256
    assert np.allclose(client.embeddings("tiny", TEXTS[0]).embedding, one["embedding"], atol=1e-7)
    body = {"query": QUERY, "documents": TEXTS, "return_documents": True}
    results = httpx.post(runtime.url + "/rerank", json=body).json()["results"]
    query = want_vector(oracle, words.encode(QUERY).ids)
    for item in results:
        vector = want_vector(oracle, words.encode(TEXTS[item["index"]]).ids)
        assert abs(item["relevance_score"] - float(query @ vector)) < 1e-5
        assert item["document"] == {"text": TEXTS[item["index"]]}
    scores = [item["relevance_score"] for item in results]
    assert scores == sorted(scores, reverse=True) and len(scores) == len(TEXTS)


def test_generative_reranker(reranker: tuple[Runtime, Any, Any]) -> None:
    runtime, oracle, words = reranker
    body = {"query": QUERY, "documents": TEXTS[:3], "top_n": 2}
    answer = httpx.post(runtime.url + "/v1/rerank", json=body).json()
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    labels = [words.token_to_id("yes"), words.token_to_id("no")]
    prompts, want = [], []
    for text in TEXTS[:3]:
        middle = f"<Instruct>: {INSTRUCT}\n<Query>: {QUERY}\n<Document>: {text}"
        parts = words.encode_batch([before, middle, after], add_special_tokens=False)
        prompts.append([token for part in parts for token in part.ids])
        want.append(float(next_logits(oracle, prompts[-1])[labels].softmax(0)[0]))
    best = sorted(range(3), key=lambda index: -want[index])[:2]
    assert [item["index"] for item in answer] == best
    for item in answer:
        assert abs(item["score"] - want[item["index"]]) < 1e-4
        assert item["document"] == TEXTS[item["index"]]
    # The same question, put together by the client.
    question = {"query": prompts[0][:5], "items": [prompt[5:] for prompt in prompts]}
    options = {"label_token_ids": labels, "apply_softmax": True}
    scores = httpx.post(runtime.url + "/v1/score", json=question | options).json()["scores"]
    assert prompts[1][:5] == prompts[2][:5] == prompts[0][:5]
    assert np.allclose([shares[0] for shares in scores], want, atol=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
def test_score_of_labels(reranker: tuple[Runtime, Any, Any], softmax: bool) -> None:
    runtime, oracle, words = reranker
    labels = [7, 20, 9]
    body = {"query": "It is ", "items": ["water", "a stone"], "label_token_ids": labels}
    answer = httpx.post(runtime.url + "/v1/score", json=body | {"apply_softmax": softmax}).json()
    assert answer["object"] == "scoring"
    for item, scores in zip(body["items"], answer["scores"], strict=True):
        logits = next_logits(oracle, words.encode("It is " + item).ids)
        want = logits[labels].softmax(0) if softmax else logits.softmax(0)[labels]
        assert np.allclose(scores, want.numpy(), atol=1e-5)


def test_generating_models_refuse_vectors(reranker: tuple[Runtime, Any, Any]) -> None:
    for path in ("/v1/embeddings", "/encode", "/api/embed", "/v1/classify"):
        body = {"input": "a", "text": "a", "model": "tiny"}
        if path == "/encode":
            body = {"text": "a"}
        answer = httpx.post(reranker[0].url + path, json=body)
        assert answer.status_code == 400
        assert "--is-embedding" in json.dumps(answer.json())


def test_engine_with_a_cross_encoder(tmp_path: Path) -> None:
    words = word_pieces()
    oracle = save(tmp_path, words, "bert-cross")
    pairs = [[QUERY, text] for text in TEXTS]
    with Engine(model_path=str(tmp_path), **OPTIONS) as engine:
        assert engine.get_model_info()["is_generation"] is False
        together = engine.rerank(pairs)
        alone = [engine.encode([pair])[0] for pair in pairs]
        scores = engine.score(QUERY, TEXTS)
        with pytest.raises(BadRequest, match=r"context length \(256 tokens\)"):
            engine.rerank([[QUERY, "word " * 300]])
        with pytest.raises(BadRequest, match="gives scores"):
            engine.generate("a")
    for pair, one, other, score in zip(pairs, together, alone, scores, strict=True):
        encoded = words.encode(*pair)
        with torch.inference_mode():
            want = oracle(
                torch.tensor([encoded.ids]), token_type_ids=torch.tensor([encoded.type_ids])
            ).logits[0]
        assert np.allclose(one["embedding"], want.sigmoid().numpy(), atol=1e-5)
        assert one["embedding"] == other["embedding"]
        assert np.allclose(score, want.numpy(), atol=2e-5)


def test_engine_makes_embeddings_with_a_causal_model() -> None:
    folder = demo_model_path()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    async def ask(engine: Engine) -> Any:
        return await engine.async_encode(TEXTS)

    with Engine(model_path=str(folder), is_embedding=True, dtype="float32", **OPTIONS) as engine:
        together = engine.encode(TEXTS)
        assert [one["embedding"] for one in asyncio.run(ask(engine))] == [
            one["embedding"] for one in together
        ]
        for refused in (engine.generate, lambda text: engine.score(text, ["b"], [1])):
            with pytest.raises(BadRequest, match="makes embeddings"):
                refused("a")
    for text, one in zip(TEXTS, together, strict=True):
        with torch.inference_mode():
            states = oracle.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        want = torch.nn.functional.normalize(states[-1], dim=0).numpy()
        assert np.dot(one["embedding"], want) >= 1 - 1e-6


def test_classifier_over_http(tmp_path: Path) -> None:
    words = word_pieces()
    oracle = save(tmp_path, words, "bert-classes", id2label={0: "low", 1: "mid", 2: "high"})
    with Runtime(model_path=str(tmp_path), **OPTIONS) as runtime:
        answer = httpx.post(runtime.url + "/v1/classify", json={"input": TEXTS}).json()
        native = httpx.post(runtime.url + "/classify", json={"text": TEXTS}).json()
        refused = httpx.post(runtime.url + "/rerank", json={"query": "a", "documents": ["b"]})
        pairs = {"query": QUERY, "items": TEXTS}
        scored = httpx.post(runtime.url + "/v1/score", json=pairs).json()["scores"]
    for text, item, plain, score in zip(TEXTS, answer["data"], native, scored, strict=True):
        with torch.inference_mode():
            want = oracle(torch.tensor([words.encode(text).ids])).logits[0]
        assert np.allclose(plain["embedding"], want.numpy(), atol=2e-5)
        assert np.allclose(item["probs"], want.softmax(0).numpy(), atol=1e-5)
        assert item["label"] == ["low", "mid", "high"][int(want.argmax())]
        assert len(score) == item["num_classes"] == 3
    assert refused.status_code == 400 and "/v1/classify" in refused.text
