"""Which document answers a query, and how likely labels are: /v1/rerank, /rerank, /v1/score.

/v1/rerank answers as SGLang does, with a bare list; /rerank and /v2/rerank as Jina and Cohere do.
Pure but for the routes.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest
from headrace.frontend.encode import check_task, pair_requests, vector_of
from headrace.frontend.native import MAX_BATCH
from headrace.frontend.scoring import Relevance, label_logprobs, label_request, softmax
from headrace.server.context import Context, Job, Stamp
from headrace.server.generation import answer, new_stamp
from headrace.server.schemas import (
    Prompts,
    PromptsOfIds,
    TokenIds,
    body_of,
    ignored_fields,
    read,
)


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(extra="allow")

    text: str


Documents = Annotated[list[str | Document], Field(min_length=1, max_length=MAX_BATCH)]


class RerankBody(BaseModel):
    """POST /v1/rerank, /rerank and /v2/rerank."""

    model_config = ConfigDict(extra="allow")

    query: str
    documents: Documents
    model: str | None = None
    instruct: str | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


class ScoreBody(BaseModel):
    """POST /v1/score."""

    model_config = ConfigDict(extra="allow")

    query: str | TokenIds
    items: str | Prompts | PromptsOfIds
    model: str | None = None
    label_token_ids: TokenIds | None = None
    apply_softmax: bool | None = None
    item_first: bool | None = None


BODIES = (RerankBody, ScoreBody)


def routes(context: Context) -> APIRouter:
    """All routes of this file."""
    router = APIRouter()

    @router.put("/v1/rerank", include_in_schema=False)
    @router.post("/v1/rerank", openapi_extra=body_of(RerankBody))
    async def rerank(http: Request) -> Response:
        """Documents by relevance, best first; a bare list, as SGLang's."""
        return await answer(http, context, lambda raw: parse_rerank(raw, context, None))

    @router.post("/v2/rerank", openapi_extra=body_of(RerankBody))
    @router.post("/rerank", openapi_extra=body_of(RerankBody))
    async def rerank_objects(http: Request) -> Response:
        """Documents by relevance, best first; Jina's and Cohere's object."""
        stamp = new_stamp("rerank-")
        return await answer(http, context, lambda raw: parse_rerank(raw, context, stamp))

    @router.post("/v1/score", openapi_extra=body_of(ScoreBody))
    async def score(http: Request) -> Response:
        """The probability of each label after query and item."""
        return await answer(http, context, lambda raw: parse_score(raw, context))

    return router


def parse_rerank(raw: bytes, context: Context, stamp: Stamp | None) -> Job:
    """The job of a body; without a `stamp` the answer is a bare list. Raises BadRequest."""
    body = read(RerankBody, raw)
    context.check_model(body.model)
    texts = [item if isinstance(item, str) else item.text for item in body.documents]
    words = context.tokenizer("query")
    relevance = Relevance(body.query, texts, body.instruct or "", context.info, words)
    reply = Ranking(body, texts, relevance, context, stamp)
    ignored = ignored_fields(body)
    if body.instruct and context.info.task != "generate":
        ignored.append("instruct")
    return Job(relevance.requests, reply, stamp.id if stamp else "", ignored)


class Ranking:
    """Documents, best first; of equal ones the earlier comes first."""

    def __init__(
        self,
        body: RerankBody,
        texts: list[str],
        relevance: Relevance,
        context: Context,
        stamp: Stamp | None,
    ) -> None:
        self._body = body
        self._texts = texts
        self._relevance = relevance
        self._model = body.model or context.model_name
        self._stamp = stamp

    def add(self, index: int, delta: Delta) -> None:
        self._relevance.add(index, delta)

    def result(self) -> Any:
        scores = self._relevance.scores()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._body.top_n]
        if self._stamp is None:
            return [self._plain(index, scores[index]) for index in order]
        tokens = self._relevance.prompt_tokens
        return {
            "id": self._stamp.id,
            "model": self._model,
            "results": [self._object(index, scores[index]) for index in order],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _plain(self, index: int, score: float) -> dict[str, Any]:
        meta = {"prompt_tokens": self._relevance.tokens(index)}
        found: dict[str, Any] = {"score": score, "index": index, "meta_info": meta}
        if self._body.return_documents is not False:
            found["document"] = self._texts[index]
        return found

    def _object(self, index: int, score: float) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "relevance_score": score}
        if self._body.return_documents:
            found["document"] = {"text": self._texts[index]}
        return found


def parse_score(raw: bytes, context: Context) -> Job:
    """The job of a body of /v1/score. Raises BadRequest, NotFound."""
    body = read(ScoreBody, raw)
    context.check_model(body.model)
    check_task(context.info, "generate", "classify")
    items: Any = [body.items] if isinstance(body.items, str) else body.items
    if not items:
        raise BadRequest("items: must not be empty", field="items")
    if context.info.pooling is not None:
        requests = _pairs(body, items, context)
    else:
        requests = _labels(body, items, context)
    reply = Scores(body, len(requests), context)
    return Job(requests, reply, ignored=ignored_fields(body))


def _pairs(body: ScoreBody, items: Sequence[Any], context: Context) -> list[GenerateRequest]:
    """A classifier scores each pair."""
    query = body.query
    if not isinstance(query, str) or not all(isinstance(item, str) for item in items):
        raise BadRequest("query: a classifier scores pairs of texts, not of ids", field="query")
    if body.label_token_ids:
        raise BadRequest(
            "label_token_ids: a classifier has labels of its own", field="label_token_ids"
        )
    pairs = [(item, query) if body.item_first else (query, item) for item in items]
    return pair_requests(pairs, context.tokenizer("query"))


def _labels(body: ScoreBody, items: Sequence[Any], context: Context) -> list[GenerateRequest]:
    """A language model says how likely each label is to come next."""
    if not body.label_token_ids:
        raise BadRequest(
            "label_token_ids: name the tokens whose probability is the score",
            field="label_token_ids",
        )
    labels = tuple(body.label_token_ids)
    if isinstance(body.query, str) != isinstance(items[0], str):
        raise BadRequest("items: must be texts if query is one, else ids", field="items")
    whole = [item + body.query if body.item_first else body.query + item for item in items]
    if isinstance(body.query, str):
        whole = context.tokenizer("query").encode_batch(whole)
    return [label_request(ids, labels) for ids in whole]


class Scores:
    """SGLang's scoring object: for each item the scores of its labels."""

    def __init__(self, body: ScoreBody, count: int, context: Context) -> None:
        self._model = body.model or context.model_name
        self._classifies = context.info.pooling is not None
        self._softmax = bool(body.apply_softmax)
        self._scores: list[list[float]] = [[]] * count
        self._tokens = 0

    def add(self, index: int, delta: Delta) -> None:
        self._tokens += delta.prompt_tokens
        self._scores[index] = self._of(delta)

    def _of(self, delta: Delta) -> list[float]:
        values = vector_of(delta).tolist() if self._classifies else label_logprobs(delta)
        if self._softmax:
            return softmax(values)
        return values if self._classifies else [math.exp(value) for value in values]

    def result(self) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self._tokens,
            "total_tokens": self._tokens,
            "completion_tokens": 0,
        }
        return {
            "scores": self._scores,
            "model": self._model,
            "usage": usage,
            "object": "scoring",
        }
