"""Vectors and labels over HTTP: /v1/embeddings, /encode, /classify, /v1/classify, Ollama's embed.

Every body becomes requests with `pool`; a reply turns their vectors into one JSON object. Pure but
for the routes and the clock.
"""

import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta
from headrace.frontend.encode import (
    HONORED,
    Encoded,
    check_dimensions,
    check_task,
    parse_encode,
    sigmoid,
    vector_of,
    vector_request,
)
from headrace.frontend.scoring import softmax
from headrace.server.context import Context, Job, Stamp
from headrace.server.generation import answer, new_stamp, send, take
from headrace.server.native import read_object
from headrace.server.ollama import check_name
from headrace.server.schemas import (
    ENCODE,
    Int64,
    Prompts,
    PromptsOfIds,
    RequestId,
    TokenIds,
    body_of,
    ignored_fields,
    read,
)

Input = str | TokenIds | Prompts | PromptsOfIds
Dimensions = Annotated[int, Field(ge=1, le=2**31 - 1)]


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="allow")

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    # Not OpenAI's, but Jina's and others'.
    truncate: bool | None = None
    priority: Int64 | None = None
    rid: RequestId | None = None


class ClassifyBody(BaseModel):
    """POST /v1/classify."""

    model_config = ConfigDict(extra="allow")

    input: Input
    model: str | None = None
    priority: Int64 | None = None


class EmbedBody(BaseModel):
    """POST /api/embed, and /api/embeddings with `prompt`, of Ollama."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1)]
    input: str | Prompts | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: Dimensions | None = None
    # There is one model, and it stays.
    keep_alive: float | str | None = None


BODIES = (EmbeddingBody, ClassifyBody, EmbedBody)


def routes(context: Context) -> APIRouter:
    """All routes of this file."""
    router = APIRouter()
    for add in (_add_openai, _add_native, _add_ollama):
        add(router, context)
    return router


def _add_openai(router: APIRouter, context: Context) -> None:
    @router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingBody))
    async def embeddings(http: Request) -> Response:
        """OpenAI's embeddings."""
        return await answer(http, context, lambda raw: parse_embeddings(raw, context))

    @router.post("/v1/classify", openapi_extra=body_of(ClassifyBody))
    async def classify(http: Request) -> Response:
        """The label of each text, with the probabilities of all labels."""
        stamp = new_stamp("classify-")
        return await answer(http, context, lambda raw: parse_classify(raw, context, stamp))


def _add_native(router: APIRouter, context: Context) -> None:
    @router.put("/encode", include_in_schema=False)
    @router.post("/encode", openapi_extra=body_of(ENCODE))
    async def encode(http: Request) -> Response:
        """SGLang's native route for vectors: text or input_ids."""
        return await answer(http, context, lambda raw: parse_native(raw, context))

    @router.put("/classify", include_in_schema=False)
    @router.post("/classify", openapi_extra=body_of(ENCODE))
    async def classify(http: Request) -> Response:
        """The scores of a classifier or reward model, as `embedding`."""

        def parse(raw: bytes) -> Job:
            check_task(context.info, "classify")
            return parse_native(raw, context)

        return await answer(http, context, parse)


def _add_ollama(router: APIRouter, context: Context) -> None:
    @router.post("/api/embed", openapi_extra=body_of(EmbedBody))
    async def embed(http: Request) -> Response:
        """Ollama's embeddings."""
        job = await take(
            http, context, lambda raw: parse_ollama(raw, context, False), any_type=True
        )
        return await send(http, context, job)

    @router.post("/api/embeddings", openapi_extra=body_of(EmbedBody))
    async def old_embed(http: Request) -> Response:
        """Ollama's older route for one text."""
        job = await take(http, context, lambda raw: parse_ollama(raw, context, True), any_type=True)
        return await send(http, context, job)


def parse_embeddings(raw: bytes, context: Context) -> Job:
    """The job of a body of /v1/embeddings. Raises BadRequest, NotFound."""
    body = read(EmbeddingBody, raw)
    context.check_model(body.model)
    check_task(context.info, "embed")
    check_dimensions(body.dimensions, context.info)
    requests = [
        vector_request(
            prompt, f"{body.rid}_{i}" if body.rid else "", body.priority, cut=bool(body.truncate)
        )
        for i, prompt in enumerate(inputs(body.input))
    ]
    return Job(requests, Embeddings(body, len(requests), context), ignored=ignored_fields(body))


def parse_classify(raw: bytes, context: Context, stamp: Stamp) -> Job:
    """The job of a body of /v1/classify. Raises BadRequest, NotFound."""
    body = read(ClassifyBody, raw)
    context.check_model(body.model)
    check_task(context.info, "classify")
    requests = [vector_request(prompt, "", body.priority) for prompt in inputs(body.input)]
    return Job(requests, Labels(len(requests), context, stamp), stamp.id, ignored_fields(body))


def parse_native(raw: bytes, context: Context) -> Job:
    """The job of a body of /encode or /classify. Raises BadRequest."""
    body = read_object(raw)
    check_task(context.info, "embed", "classify")
    call = parse_encode(body, context.tokenizer)
    check_dimensions(call.dimensions, context.info)
    ignored = [name for name, value in body.items() if name not in HONORED and value is not None]
    return Job(call.requests, Encoded(call, context.info), ignored=ignored)


def parse_ollama(raw: bytes, context: Context, old: bool) -> Job:
    """The job of a body of /api/embed, or of its `old` form. Raises BadRequest, NotFound."""
    body = read(EmbedBody, raw)
    check_name(body.model, context)
    check_task(context.info, "embed")
    check_dimensions(body.dimensions, context.info)
    field, given = ("prompt", body.prompt) if old else ("input", body.input)
    if given is None:
        raise BadRequest(f"{field}: Field required", field=field)
    # As Ollama does, nothing is made of nothing.
    texts = ([given] if given else []) if isinstance(given, str) else given
    requests = [vector_request(text, cut=body.truncate is not False) for text in texts]
    return Job(requests, OllamaEmbeddings(body, len(texts), old), ignored=ignored_fields(body))


def inputs(given: Any) -> list[str | list[int]]:
    """One entry per prompt; a flat list of ids is one prompt."""
    if not given:
        raise BadRequest("input: must not be empty", field="input")
    one = isinstance(given, str) or isinstance(given[0], int)
    prompts: list[str | list[int]] = [given] if one else given
    if not all(prompts):
        raise BadRequest("input: must not hold an empty prompt", field="input")
    return prompts


class _Gathered:
    """The vectors of a job, in the order of its requests, and the tokens they took."""

    def __init__(self, count: int, dimensions: int | None = None) -> None:
        self._dimensions = dimensions
        self.vectors: list[np.ndarray] = [np.empty(0, np.float32)] * count
        self.tokens = 0

    def take(self, index: int, delta: Delta) -> None:
        self.vectors[index] = vector_of(delta, self._dimensions)
        self.tokens += delta.prompt_tokens

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


class Embeddings:
    """OpenAI's list of embeddings."""

    def __init__(self, body: EmbeddingBody, count: int, context: Context) -> None:
        self._base64 = body.encoding_format == "base64"
        self._model = body.model or context.model_name
        self._found = _Gathered(count, body.dimensions)

    def add(self, index: int, delta: Delta) -> None:
        self._found.take(index, delta)

    def result(self) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(vector)}
            for index, vector in enumerate(self._found.vectors)
        ]
        return {"object": "list", "data": data, "model": self._model, "usage": self._found.usage()}

    def _written(self, vector: np.ndarray) -> list[float] | str:
        if self._base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


class Labels:
    """The most likely label of each text. A classifier of one label gives its probability."""

    def __init__(self, count: int, context: Context, stamp: Stamp) -> None:
        assert context.info.pooling is not None
        self._labels = context.info.pooling.labels
        self._head = {
            "id": stamp.id,
            "object": "list",
            "created": stamp.created,
            "model": context.model_name,
        }
        self._found = _Gathered(count)

    def add(self, index: int, delta: Delta) -> None:
        self._found.take(index, delta)

    def result(self) -> dict[str, Any]:
        data = [self._item(*pair) for pair in enumerate(self._found.vectors)]
        return {
            **self._head,
            "data": data,
            "usage": {**self._found.usage(), "completion_tokens": 0},
        }

    def _item(self, index: int, vector: np.ndarray) -> dict[str, Any]:
        values = vector.tolist()
        probabilities = softmax(values) if len(values) > 1 else [sigmoid(values[0])]
        best = max(range(len(values)), key=probabilities.__getitem__)
        return {
            "index": index,
            "label": self._labels[best],
            "probs": probabilities,
            "num_classes": len(values),
        }


class OllamaEmbeddings:
    """Ollama's list of embeddings, or the one of its older route."""

    def __init__(self, body: EmbedBody, count: int, old: bool) -> None:
        self._model = body.model
        self._old = old
        self._started = time.monotonic_ns()
        self._found = _Gathered(count, body.dimensions)

    def add(self, index: int, delta: Delta) -> None:
        self._found.take(index, delta)

    def result(self) -> dict[str, Any]:
        vectors = [vector.tolist() for vector in self._found.vectors]
        if self._old:
            return {"embedding": vectors[0] if vectors else []}
        return {
            "model": self._model,
            "embeddings": vectors,
            "total_duration": time.monotonic_ns() - self._started,
            "load_duration": 0,
            "prompt_eval_count": self._found.tokens,
        }
