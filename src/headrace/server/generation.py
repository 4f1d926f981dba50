"""The routes that generate: read the body, let an adapter understand it, send its answer.

One path for all protocols; what differs is in the adapters. The body is bounded before it is
parsed. A large one, or one whose chat template takes long, is parsed in a thread so that other
streams go on; so an adapter may be asked twice.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.serve_options import ServeOptions
from headrace.server import native, openai_chat, openai_completions
from headrace.server.census import check_values
from headrace.server.context import Context, Job, Stamp
from headrace.server.errors import TooLarge
from headrace.server.ignored import warnings
from headrace.server.schemas import NATIVE, ChatRequest, CompletionRequest, body_of
from headrace.server.sse import EventReply, EventStream, to_json, whole
from headrace.text.template import TakesLong, patience

T = TypeVar("T")

LARGE_BODY = 32 << 10
# How long a chat template may hold up the event loop.
ON_LOOP_SECONDS = 0.02


def routes(context: Context) -> APIRouter:
    """/generate, /v1/completions, /v1/chat/completions."""
    router = APIRouter()

    @router.put("/generate", include_in_schema=False)
    @router.post("/generate", openapi_extra=body_of(NATIVE))
    async def generate(http: Request) -> Response:
        """SGLang's native route: text or input_ids with sampling_params."""
        return await answer(http, context, lambda raw: native.parse(raw, context))

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(http: Request) -> Response:
        """OpenAI's completions."""
        stamp = new_stamp("cmpl-")
        return await answer(
            http, context, lambda raw: openai_completions.parse(raw, context, stamp)
        )

    @router.post("/invocations", include_in_schema=False)
    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat(http: Request) -> Response:
        """OpenAI's chat completions."""
        stamp = new_stamp("chatcmpl-")
        return await answer(http, context, lambda raw: openai_chat.parse(raw, context, stamp))

    return router


async def answer(
    http: Request, context: Context, parse: Callable[[bytes], Job], *, slow: bool = False
) -> Response:
    """Serve one request from body to response; with a full queue its body is not even read."""
    context.manager.check_room()
    return await send(http, context, await take(http, context, parse, slow=slow))


async def take(
    http: Request,
    context: Context,
    parse: Callable[[bytes], T],
    *,
    any_type: bool = False,
    slow: bool = False,
) -> T:
    """What `parse` makes of the body of a request.

    A large one is parsed in a thread, and any if `slow`: when the work is not linear in its size.
    """
    context.check_ready()
    raw = await read_body(http, context.config.serve, any_type=any_type)
    if not slow and len(raw) <= LARGE_BODY:
        try:
            with patience(ON_LOOP_SECONDS):
                return parse(raw)
        except TakesLong:
            pass
    return await asyncio.to_thread(parsed_apart, parse, raw)


def parsed_apart(parse: Callable[[bytes], T], raw: bytes) -> T:
    """In a thread: what a refused body was read into is freed here, not on the event loop."""
    try:
        return parse(raw)
    except HeadraceError as error:
        error.__context__ = None
        raise error.with_traceback(None) from None


async def send(http: Request, context: Context, job: Job) -> Response:
    """Generate what `job` asks for, as a stream or in one piece."""
    headers = headers_of(job, context)
    deltas = context.manager.generate_many(job.requests)
    if isinstance(job.reply, EventReply):
        return EventStream(deltas, job.reply, headers, job.wire)
    value = await whole(http.receive, deltas, job.reply)
    return Response(to_json(value), headers=headers, media_type="application/json")


def headers_of(job: Job, context: Context) -> dict[str, str]:
    """The request's id, and the names of fields that had no effect."""
    named = {"x-request-id": job.id} if job.id else {}
    return named | warnings(job.ignored, strict=context.config.serve.strict_fields)


async def read_body(http: Request, serve: ServeOptions, *, any_type: bool = False) -> bytes:
    """The body of a JSON request; with `any_type` whatever its content type says.

    Raises:
        TooLarge: more than --max-request-bytes; the rest is not read.
        BadRequest: the content type is not JSON, or more than --max-request-values.
    """
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if not any_type and kind != "application/json" and not kind.endswith("+json"):
        raise BadRequest(f"Content-Type must be application/json, not {kind!r}.")
    raw = await read_raw(http, serve.max_request_bytes)
    if len(raw) > LARGE_BODY:
        await asyncio.to_thread(check_values, raw, serve.max_request_values)
    else:
        check_values(raw, serve.max_request_values)
    return raw


async def read_raw(http: Request, limit: int) -> bytes:
    """The body of a request of any type; raises TooLarge."""
    refusal = TooLarge(f"The body is larger than {limit} bytes (--max-request-bytes).")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise refusal
    raw = bytearray()
    async for piece in http.stream():
        raw += piece
        if len(raw) > limit:
            raise refusal
    return bytes(raw)


def new_stamp(prefix: str) -> Stamp:
    """A fresh id in OpenAI's form, and the time."""
    return Stamp(prefix + uuid.uuid4().hex, int(time.time()))
