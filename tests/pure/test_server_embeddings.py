"""Routes of vectors and scores in-process, with a scripted model: shapes, order, wrong bodies."""

import base64
import functools
from typing import Any

import msgspec
import numpy as np
import pytest
from starlette.testclient import TestClient
from tokenizers import processors

from headrace.core.config import Config
from headrace.core.messages import Delta, FinishReason, GenerateRequest, unpack_ids
from headrace.core.pooling import Pooling
from headrace.server.app import build_app
from tests.support.scripted_manager import ScriptedManager

EMBED = Pooling(how="lasttoken")
CROSS = Pooling(how="cls", normalize=False, encoder=True, labels=("relevant",))
RANKS = msgspec.structs.replace(CROSS, sigmoid=True)
CLASSES = Pooling(how="lasttoken", normalize=False, labels=("bad", "good", "great"))


def vector(request: GenerateRequest, labels: int) -> list[float]:
    """What the scripted model makes of a prompt: its length, then smaller and smaller."""
    length = len(unpack_ids(request.ids))
    return [length / (i + 1) - 5 for i in range(labels)] if labels else [3.0, 4.0, float(length)]


def server(pooling: Pooling | None, **options: Any) -> tuple[TestClient, ScriptedManager]:
    labels = len(pooling.labels) if pooling else 0

    def script(request: GenerateRequest) -> list[Delta]:
        return [
            Delta(
                request.rid,
                finish=FinishReason("length"),
                prompt_tokens=len(unpack_ids(request.ids)),
                pooled=np.array(vector(request, labels), "<f4").tobytes(),
            )
        ]

    manager = ScriptedManager(Config.from_flat({"served_model_name": "tiny"} | options), script)
    manager.info = msgspec.structs.replace(manager.info, pooling=pooling, hidden_size=3)
    app = build_app(manager, manager.config, manager.info)
    return TestClient(app, raise_server_exceptions=False), manager


# One app for all bodies that it refuses: they leave nothing behind.
refusing = functools.cache(server)


def test_embeddings_as_numbers_and_bytes() -> None:
    client, manager = server(EMBED)
    body = {"input": [[5, 6], [7]], "model": "tiny"}
    answer = client.post("/v1/embeddings", json=body).json()
    assert [item["embedding"] for item in answer["data"]] == [[3.0, 4.0, 2.0], [3.0, 4.0, 1.0]]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    written = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(written["data"][1]["embedding"]), "<f4")
    assert found.tolist() == [3.0, 4.0, 1.0]
    cut = client.post("/v1/embeddings", json=body | {"dimensions": 2}).json()
    assert np.allclose(cut["data"][0]["embedding"], [0.6, 0.8])
    specs = [request.pool for request in manager.seen]
    assert all(spec is not None and spec.reuse and spec.pieces for spec in specs)


def test_dimensions_that_a_model_names() -> None:
    client, _ = server(msgspec.structs.replace(EMBED, sizes=(2,)))
    assert client.post("/v1/embeddings", json={"input": "a", "dimensions": 2}).status_code == 200
    answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "dimensions"


def test_encode_one_and_many() -> None:
    client, _ = server(EMBED)
    one = client.post("/encode", json={"input_ids": [5, 6], "rid": "r", "log_metrics": True})
    assert one.json()["embedding"] == [3.0, 4.0, 2.0]
    assert one.json()["meta_info"]["id"] == "r"
    assert one.headers["x-headrace-ignored"] == "log_metrics"
    many = client.put("/encode", json={"text": ["a", "b"], "rid": "r"}).json()
    assert [item["meta_info"]["id"] for item in many] == ["r_0", "r_1"]


def test_classes() -> None:
    client, _ = server(CLASSES)
    answer = client.post("/v1/classify", json={"input": [1, 2, 3]}).json()
    (item,) = answer["data"]
    assert item["label"] == "bad" and item["num_classes"] == 3
    assert abs(sum(item["probs"]) - 1) < 1e-12
    scores = client.post("/v1/score", json={"query": "a", "items": ["b"]}).json()["scores"]
    shares = client.post(
        "/v1/score", json={"query": "a", "items": ["b"], "apply_softmax": True}
    ).json()["scores"]
    powers = np.exp(scores[0])
    assert np.allclose(shares[0], powers / powers.sum())


def test_rankings_in_both_shapes() -> None:
    client, manager = server(RANKS)
    documents = ["water", "water and wheels and mills", {"text": "water and wheels"}]
    body = {"query": "wheel", "documents": documents, "top_n": 2}
    plain = client.post("/v1/rerank", json=body).json()
    assert [item["index"] for item in plain] == [1, 2]
    assert [item["document"] for item in plain] == [documents[1], "water and wheels"]
    assert all(0 < item["score"] <= 1 for item in plain)
    assert not any(request.pool is None or request.pool.pieces for request in manager.seen)
    for path in ("/rerank", "/v2/rerank"):
        found = client.post(path, json=body).json()
        assert [item["relevance_score"] for item in found["results"]] == [
            item["score"] for item in plain
        ]
        assert "document" not in found["results"][0]
        assert found["usage"]["total_tokens"] > 0


def test_ollama_makes_nothing_of_nothing() -> None:
    client, manager = server(EMBED)
    for nothing in ([], ""):
        answer = client.post("/api/embed", json={"model": "tiny", "input": nothing})
        assert answer.status_code == 200
        assert answer.json()["embeddings"] == [] and answer.json()["prompt_eval_count"] == 0
    answer = client.post("/api/embeddings", json={"model": "tiny", "prompt": ""})
    assert answer.json() == {"embedding": []}
    assert manager.seen == []
    # OpenAI refuses it.
    assert client.post("/v1/embeddings", json={"input": []}).status_code == 400


@pytest.mark.parametrize("pooling", [EMBED, CROSS])
def test_long_texts_are_cut_only_on_demand(pooling: Pooling) -> None:
    client, manager = server(pooling)
    end = 1  # </s>, which no text here ends with by itself
    words = manager.tokenizer
    assert words is not None and end in words.special_ids
    words.backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", end)]
    )
    long = "wheel, " * 300
    bodies: dict[str, dict[str, Any]] = {"/rerank": {"query": "a", "documents": ["b", long]}}
    if pooling is EMBED:
        bodies |= {"/v1/embeddings": {"input": ["b", long]}, "/api/embed": {"input": ["b", long]}}
    for path, body in bodies.items():
        whole = client.post(path, json={"model": "tiny", "truncate": False} | body)
        assert whole.status_code == 400 and "context length (256 tokens)" in whole.text
        assert manager.seen == []
        short = client.post(path, json={"model": "tiny", "truncate": True} | body)
        assert short.status_code == 200, short.text
        *_, first, second = (unpack_ids(request.ids).tolist() for request in manager.seen)
        assert first[-1] == second[-1] == end and len(second) == 256 > len(first)
        manager.seen.clear()
    assert client.post("/rerank", json=bodies["/rerank"]).status_code == 400
    client, manager = server(pooling, allow_auto_truncate=True)
    ids = list(range(5, 300))
    assert client.post("/encode", json={"input_ids": [*ids, end]}).status_code == 200
    assert unpack_ids(manager.seen[-1].ids).tolist() == [*ids[:255], end]


def test_scores_of_pairs_are_probabilities() -> None:
    plain, _ = server(CROSS)
    sigmoid, _ = server(RANKS)
    pairs = {"text": [["water", "wheel"], ["a", "water and wheels and mills"]]}
    logits = [item["embedding"][0] for item in plain.post("/encode", json=pairs).json()]
    shares = [item["embedding"][0] for item in sigmoid.post("/encode", json=pairs).json()]
    assert np.allclose(shares, 1 / (1 + np.exp(-np.array(logits))), atol=1e-12)
    # One text alone is for reward models, whose scores are logits.
    one = {"text": "water"}
    assert (
        plain.post("/classify", json=one).json()["embedding"]
        == (sigmoid.post("/classify", json=one).json()["embedding"])
    )


@pytest.mark.parametrize("pooling", [None, EMBED, CROSS, CLASSES])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": None, "input": None},
        {"text": [], "input": [[]], "documents": [], "items": []},
        {"text": [["a", "b"], "c"], "input": [["a"], "b"]},
        {"text": [["a"]], "input": [[]], "query": [], "items": [[]]},
        {"input_ids": [1, [2]], "input": [1, "a"], "query": "a", "items": [1, "a"]},
        {"input_ids": [[]], "input": [1 << 40]},
        {"input_ids": [1 << 40], "input": [-1]},
        {"text": "a", "rid": ["x", "y"], "dimensions": 0, "query": "a"},
        {"text": "a", "dimensions": "2", "documents": [{"body": "a"}], "query": "a"},
        {"query": "a", "items": ["b"], "label_token_ids": [1 << 30], "input": {"image": "x"}},
    ],
)
def test_wrong_bodies_are_named(pooling: Pooling | None, body: dict[str, Any]) -> None:
    client, _ = refusing(pooling)
    paths = ["/v1/embeddings", "/encode", "/classify", "/v1/classify", "/v1/rerank", "/rerank"]
    for path in [*paths, "/v1/score", "/api/embed", "/api/embeddings"]:
        answer = client.post(path, json={"model": "tiny", **body})
        assert answer.status_code == 400, (path, answer.text)
