"""Which document answers a query, and how likely labels are: /v1/rerank, /rerank, /v1/score.

/v1/rerank answers as SGLang does, with a bare list; /rerank and /v2/rerank as Jina and Cohere do.
Pure but for the routes.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from headrace.core.messages import Delta
from headrace.frontend.encode import check_task
from headrace.frontend.native import MAX_BATCH
from headrace.frontend.scoring import LabelScores, Question, Ranked, Relevance
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
    truncate: bool | None = None


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
        return await answer(http, context, lambda raw: parse_rerank(raw, context, None), slow=True)

    @router.post("/v2/rerank", openapi_extra=body_of(RerankBody))
    @router.post("/rerank", openapi_extra=body_of(RerankBody))
    async def rerank_objects(http: Request) -> Response:
        """Documents by relevance, best first; Jina's and Cohere's object."""
        stamp = new_stamp("rerank-")
        return await answer(http, context, lambda raw: parse_rerank(raw, context, stamp), slow=True)

    @router.post("/v1/score", openapi_extra=body_of(ScoreBody))
    async def score(http: Request) -> Response:
        """The probability of each label after query and item."""
        return await answer(http, context, lambda raw: parse_score(raw, context), slow=True)

    return router


def parse_rerank(raw: bytes, context: Context, stamp: Stamp | None) -> Job:
    """The job of a body; without a `stamp` the answer is a bare list. Raises BadRequest."""
    body = read(RerankBody, raw)
    context.check_model(body.model)
    texts = [item if isinstance(item, str) else item.text for item in body.documents]
    ranked = Ranked(body.query, texts, body.instruct or "", cut=bool(body.truncate))
    relevance = Relevance(ranked, context.info, context.tokenizer("query"))
    reply = Ranking(body, texts, relevance, context, stamp)
    ignored = ignored_fields(body)
    generates = context.info.task == "generate"
    if body.instruct and not generates:
        ignored.append("instruct")
    if body.truncate and generates:
        ignored.append("truncate")
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
    question = Question(
        body.query,
        items,
        tuple(body.label_token_ids or ()),
        apply_softmax=bool(body.apply_softmax),
        item_first=bool(body.item_first),
    )
    scores = LabelScores(question, context.info, context.tokenizer)
    reply = ScoreReply(scores, body.model or context.model_name)
    return Job(scores.requests, reply, ignored=ignored_fields(body))


class ScoreReply:
    """SGLang's scoring object: for each item the scores of its labels."""

    def __init__(self, scores: LabelScores, model: str) -> None:
        self._scores = scores
        self._model = model

    def add(self, index: int, delta: Delta) -> None:
        self._scores.add(index, delta)

    def result(self) -> dict[str, Any]:
        tokens = self._scores.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        return {
            "scores": self._scores.scores(),
            "model": self._model,
            "usage": usage,
            "object": "scoring",
        }
