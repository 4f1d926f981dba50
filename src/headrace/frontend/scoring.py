"""How well documents answer a query, and how likely labels follow a text: requests and scores.

Three kinds of models can judge: cross-encoders read query and document as a pair, embedding models
compare vectors, and generative rerankers (Qwen3-Reranker) say yes or no. Pure: no sockets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest, LogprobSpec, SamplingParams
from headrace.core.model_info import ModelInfo
from headrace.frontend.encode import (
    TokenizerFor,
    packed,
    pair_requests,
    relevance_of,
    sigmoid,
    vector_of,
    vector_request,
)
from headrace.frontend.requests import new_rid
from headrace.text.tokenizer import Tokenizer

# The format that Qwen3-Reranker was trained on (arXiv 2506.05176, section 2).
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0, seed=0, ignore_eos=True)


@dataclass(frozen=True)
class Ranked:
    """Documents to be ranked by how well they answer a query.

    `instruct`: the task, for models that are told one; "" for the usual one. `cut`: what is too
    long is shortened, not refused; a generative reranker cannot.
    """

    query: str
    documents: Sequence[str]
    instruct: str = ""
    cut: bool = False


class Relevance:
    """What is known of the relevance of documents so far."""

    def __init__(self, ranked: Ranked, info: ModelInfo, words: Tokenizer) -> None:
        self.task = info.task
        self.prompt_tokens = 0
        self._info = info
        query, documents = ranked.query, ranked.documents
        self._deltas: dict[int, Delta] = {}
        if self.task == "embed":
            texts = [query, *documents]
            self.requests = [vector_request(text, cut=ranked.cut) for text in texts]
        elif self.task == "classify":
            _check_one_score(info)
            pairs = [(query, text) for text in documents]
            self.requests = pair_requests(pairs, words, cut=ranked.cut)
        else:
            self.requests = _questions(query, documents, ranked.instruct or INSTRUCT, words)

    def add(self, index: int, delta: Delta) -> None:
        """Take in the delta of a request, which has only one."""
        self._deltas[index] = delta
        self.prompt_tokens += delta.prompt_tokens

    def tokens(self, index: int) -> int:
        """Tokens of the request of a document."""
        return self._deltas[index + (self.task == "embed")].prompt_tokens

    def scores(self) -> list[float]:
        """Of each document: the cosine of an embedding model, else mostly a probability."""
        deltas = [self._deltas[index] for index in range(len(self.requests))]
        if self.task == "embed":
            query, *documents = (vector_of(delta).astype(np.float64) for delta in deltas)
            return [cosine(query, vector) for vector in documents]
        if self.task == "classify":
            return [relevance_of(delta, self._info)[0] for delta in deltas]
        return [sigmoid(yes - no) for yes, no in map(label_logprobs, deltas)]


def _check_one_score(info: ModelInfo) -> None:
    assert info.pooling is not None
    if len(info.pooling.labels) != 1:
        raise BadRequest(
            f"model: this classifier has {len(info.pooling.labels)} labels, a reranker has one; "
            "use /v1/classify",
            field="model",
        )


def _questions(
    query: str, documents: Sequence[str], instruct: str, words: Tokenizer
) -> list[GenerateRequest]:
    """Is a document relevant? One request each, whose next token is yes or no."""
    answers = words.encode_batch(["yes", "no"], False)
    if words.special_id("<|im_start|>") is None or [len(ids) for ids in answers] != [1, 1]:
        raise BadRequest(
            "model: this server's model is no reranker: it must be a cross-encoder "
            "(...ForSequenceClassification with one label), an embedding model, or a generative "
            "reranker in the format of Qwen3-Reranker",
            field="model",
        )
    labels = tuple(ids[0] for ids in answers)
    texts = [
        f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"
        for document in documents
    ]
    before, after, *bodies = words.encode_batch([_BEFORE, _AFTER, *texts], False)
    return [label_request(before + body + after, labels) for body in bodies]


@dataclass(frozen=True)
class Question:
    """Items to be scored beside a query: texts, or token ids, of both.

    `labels`: the token ids whose probability after query and item is the score; a classifier has
    labels of its own. With `apply_softmax` the scores of an item add up to 1.
    """

    query: str | list[int]
    items: Sequence[str] | Sequence[list[int]]
    labels: tuple[int, ...] = ()
    apply_softmax: bool = False
    item_first: bool = False


class LabelScores:
    """A question, and what is known of its answer so far.

    Raises:
        BadRequest: the model cannot answer it.
    """

    def __init__(self, question: Question, info: ModelInfo, tokenizer: TokenizerFor) -> None:
        if not question.items:
            raise BadRequest("items: must not be empty", field="items")
        self.prompt_tokens = 0
        self._softmax = question.apply_softmax
        self._classifies = info.task == "classify"
        make = _scored_pairs if self._classifies else _scored_labels
        self.requests = make(question, tokenizer)
        self._scores: list[list[float]] = [[]] * len(self.requests)

    def add(self, index: int, delta: Delta) -> None:
        """Take in the delta of a request, which has only one."""
        self.prompt_tokens += delta.prompt_tokens
        values = vector_of(delta).tolist() if self._classifies else label_logprobs(delta)
        if self._softmax:
            values = softmax(values)
        elif not self._classifies:
            values = [math.exp(value) for value in values]
        self._scores[index] = values

    def scores(self) -> list[list[float]]:
        """For each item the score of each label."""
        return self._scores


def _scored_pairs(question: Question, tokenizer: TokenizerFor) -> list[GenerateRequest]:
    """A classifier scores each pair."""
    if question.labels:
        raise BadRequest(
            "label_token_ids: a classifier has labels of its own", field="label_token_ids"
        )
    query, pairs = question.query, []
    for item in question.items:
        if not isinstance(query, str) or not isinstance(item, str):
            raise BadRequest("query: a classifier scores pairs of texts, not of ids", field="query")
        pairs.append((item, query) if question.item_first else (query, item))
    return pair_requests(pairs, tokenizer("query"))


def _scored_labels(question: Question, tokenizer: TokenizerFor) -> list[GenerateRequest]:
    """A language model says how likely each label is to come next."""
    if not question.labels:
        raise BadRequest(
            "label_token_ids: name the tokens whose probability is the score",
            field="label_token_ids",
        )
    query: Any = question.query
    if any(isinstance(item, str) != isinstance(query, str) for item in question.items):
        raise BadRequest("items: must be texts if query is one, else ids", field="items")
    whole = [item + query if question.item_first else query + item for item in question.items]
    if isinstance(query, str):
        whole = tokenizer("query").encode_batch(whole)
    return [label_request(ids, question.labels) for ids in whole]


def label_request(ids: Sequence[int], labels: tuple[int, ...]) -> GenerateRequest:
    """How likely is each of `labels` to be the next token?"""
    spec = LogprobSpec(ids=labels)
    return GenerateRequest(rid=new_rid(), ids=packed(ids), sampling=_ONE_TOKEN, logprobs=spec)


def label_logprobs(delta: Delta) -> list[float]:
    """The log-probability of each label of a `label_request`."""
    assert delta.logprobs is not None
    return [value for _, value in delta.logprobs.ids[0] or ()]


def softmax(values: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors, 0 if one is zero."""
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
