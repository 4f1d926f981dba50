"""/tokenize and /detokenize: the tokenizer and the chat template, without a generation."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from headrace.core.errors import BadRequest
from headrace.server.admin import json_response
from headrace.server.answers import prompt_ids
from headrace.server.context import Context
from headrace.server.generation import read_body
from headrace.server.ignored import warnings
from headrace.server.openai_chat import chat_of
from headrace.server.schemas import (
    DetokenizeRequest,
    TokenizeRequest,
    body_of,
    ignored_fields,
    read,
)


def routes(context: Context) -> APIRouter:
    """Both routes, each also under /v1."""
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    @router.post("/v1/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        """Token ids of a prompt, of several prompts, or of messages through the chat template."""
        raw = await read_body(http, context.config.serve)
        return await asyncio.to_thread(_tokenize, raw, context)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    @router.post("/v1/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        """Text of token ids, or of several lists of them."""
        raw = await read_body(http, context.config.serve)
        return await asyncio.to_thread(_detokenize, raw, context)

    return router


def _tokenize(raw: bytes, context: Context) -> Response:
    body = read(TokenizeRequest, raw)
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give exactly one of prompt and messages", field="prompt")
    tokens: list[int] | list[list[int]]
    if body.prompt is None:
        tokens = prompt_ids(chat_of(body), context)
    else:
        tokenizer = context.tokenizer("prompt")
        special = body.add_special_tokens is not False
        if isinstance(body.prompt, str):
            tokens = tokenizer.encode(body.prompt, special)
        else:
            tokens = tokenizer.encode_batch(body.prompt, special)
    many = isinstance(body.prompt, list)
    value = {
        "tokens": tokens,
        "count": [len(ids) for ids in tokens] if many else len(tokens),  # type: ignore[arg-type]
        "max_model_len": context.context_length,
    }
    return _answer(value, body, context)


def _detokenize(raw: bytes, context: Context) -> Response:
    body = read(DetokenizeRequest, raw)
    tokenizer = context.tokenizer("tokens")
    skip = body.skip_special_tokens is not False

    def text(ids: list[int]) -> str:
        limit = context.info.vocab_size
        if wrong := [token for token in ids if token >= limit]:
            raise BadRequest(
                f"tokens: {wrong[0]} is not a token id of this model (0 to {limit - 1})",
                field="tokens",
            )
        return tokenizer.decode(ids, skip)

    many: Any = body.tokens
    if many and isinstance(many[0], list):
        return _answer({"text": [text(ids) for ids in many]}, body, context)
    return _answer({"text": text(many)}, body, context)


def _answer(value: dict[str, Any], body: BaseModel, context: Context) -> Response:
    return json_response(
        value, warnings(ignored_fields(body), strict=context.config.serve.strict_fields)
    )
