"""/v1/responses: OpenAI's Responses protocol, with a store that is off unless asked for.

With the store, a response can be gone on with (previous_response_id), fetched, deleted, and made in
the background, where it outlives its connection. Everything runs in this process: a background
response is an ordinary request whose consumer is a task.
"""

import asyncio
import logging
import time
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.core.errors import BadRequest, Cancelled, HeadraceError, Unsupported
from headrace.core.messages import GenerateRequest, LogprobSpec, SamplingParams, pack_ids
from headrace.core.tenant import new_id
from headrace.frontend.requests import namespace
from headrace.server.admin import json_response
from headrace.server.answers import listen, prompt_ids
from headrace.server.context import Context, Job, Stamp
from headrace.server.errors import internal_error
from headrace.server.generation import headers_of, send, take
from headrace.server.response_store import ResponseStore, Stored
from headrace.server.responses_input import LOGPROBS, ResponsesRequest, understand
from headrace.server.responses_reply import ResponseBody, ResponseEvents, ResponseResult
from headrace.server.schemas import body_of, read
from headrace.server.sse import Wire, raise_failure

log = logging.getLogger(__name__)

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
)


class Turn(NamedTuple):
    """A body, understood: the job, its response, and the entry of the store, if it goes there."""

    job: Job
    response: ResponseBody
    stored: Stored | None
    background: bool


def routes(context: Context) -> APIRouter:
    """Create, fetch, list input, cancel, delete."""
    serve = context.config.serve
    store = ResponseStore(serve.response_store_size if serve.enable_response_store else 0)
    router = APIRouter()

    @router.post("/v1/responses", openapi_extra=body_of(ResponsesRequest))
    async def create(http: Request) -> Response:
        """OpenAI's responses."""
        stamp = Stamp(new_id("resp_"), int(time.time()))
        turn = await take(http, context, lambda raw: parse(raw, context, store, stamp))
        if turn.background and turn.stored is not None:
            headers = headers_of(turn.job, context)
            turn.stored.task = asyncio.create_task(_make(turn, turn.stored, context))
            store.put(turn.stored)
            return json_response(turn.stored.response, headers)
        return await send(http, context, turn.job)

    @router.get("/v1/responses/{id}")
    async def fetch(id: str, stream: bool = False) -> Response:
        """A stored response as far as it is."""
        if stream:
            raise Unsupported("stream: a stored response is not streamed again", field="stream")
        return json_response(store.get(id).response)

    @router.get("/v1/responses/{id}/input_items")
    async def input_items(id: str) -> Response:
        """The items that a stored response answered, newest first."""
        items = [
            {"id": f"item_{number}", **item} for number, item in enumerate(store.get(id).inputs)
        ]
        items.reverse()
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
        return json_response({"object": "list", "data": items, "has_more": False, **ends})

    @router.post("/v1/responses/{id}/cancel")
    async def cancel(id: str) -> Response:
        """Stop a background response."""
        stored = store.get(id)
        if stored.task is None:
            raise BadRequest("Only a background response can be cancelled.", field="response_id")
        stored.task.cancel()
        await asyncio.wait((stored.task,))
        if stored.response["status"] in ("queued", "in_progress"):  # it had not begun
            stored.response = {**stored.response, "status": "cancelled"}
        return json_response(stored.response)

    @router.delete("/v1/responses/{id}")
    async def delete(id: str) -> Response:
        store.delete(id)
        return json_response({"id": id, "object": "response", "deleted": True})

    return router


def parse(raw: bytes, context: Context, store: ResponseStore, stamp: Stamp) -> Turn:
    """What a body asks for.

    Raises:
        BadRequest: names the field.
        NotFound: the model or the previous response is not here.
    """
    body = read(ResponsesRequest, raw)
    context.check_model(body.model)
    if body.background:
        store.check_on("background")
        if body.stream or body.store is False:
            raise Unsupported(
                "background: needs store and cannot be streamed; fetch the response instead",
                field="background",
            )
    history: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        store.check_on("previous_response_id")
        history = _finished(store.get(body.previous_response_id)).conversation
    stamp = stamp._replace(id=body.request_id or stamp.id)
    return _turn(body, history, context, store, stamp)


def _finished(stored: Stored) -> Stored:
    if stored.running:
        raise BadRequest(
            "previous_response_id: that response is still being made", field="previous_response_id"
        )
    return stored


def _turn(
    body: ResponsesRequest,
    history: list[dict[str, Any]],
    context: Context,
    store: ResponseStore,
    stamp: Stamp,
) -> Turn:
    found = understand(body, history)
    if body.store and not store.size:
        found.ignored.append("store")
    ids = prompt_ids(found.chat, context)
    stored = Stored({}, found.inputs, history) if store.size and body.store is not False else None

    def keep(value: dict[str, Any]) -> None:
        if stored is not None:
            stored.response = value
            if not body.background:
                store.put(stored)

    with_logprobs = body.top_logprobs or LOGPROBS in (body.include or ())
    request = GenerateRequest(
        rid=stamp.id,
        ids=pack_ids(ids),
        sampling=_sampling(body, context),
        # Log-probabilities belong to pieces of text, so they must come in pieces.
        stream=bool(body.stream or with_logprobs or body.background),
        logprobs=LogprobSpec(top=body.top_logprobs or 0) if with_logprobs else None,
        priority=body.priority,
        namespace=namespace(body.cache_salt, body.extra_key),
    )
    request, answer, unenforced = listen(found.chat, request, context)
    found.ignored.extend(unenforced)
    response = ResponseBody(body, found, answer, context, stamp, keep)
    if stored is not None:
        stored.response = response.running("queued")
    if not body.stream:
        job = Job([request], ResponseResult(response, time.time), stamp.id, found.ignored)
        return Turn(job, response, stored, bool(body.background))
    events = ResponseEvents(response, time.time)
    wire = Wire(done=b"", failed=events.failed, idle=b": keep-alive\n\n")
    return Turn(Job([request], events, stamp.id, found.ignored, wire), response, stored, False)


def _sampling(body: ResponsesRequest, context: Context) -> SamplingParams:
    given = {name: getattr(body, name) for name in _SAMPLING}
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    most = context.max_tokens(body.max_output_tokens, None)
    return msgspec.structs.replace(context.openai_sampling, max_new_tokens=most, **changes)


async def _make(turn: Turn, stored: Stored, context: Context) -> None:
    """Make a background response; whatever happens is told by its status."""
    response, reply = turn.response, turn.job.reply
    assert isinstance(reply, ResponseResult)
    deltas = context.manager.generate_many(turn.job.requests)
    try:
        async for index, delta in deltas:
            raise_failure(delta)
            reply.add(index, delta)
            stored.response = response.running()
        reply.result()
    except asyncio.CancelledError:
        stored.response = response.broken(Cancelled("Cancelled."), "cancelled")
    except HeadraceError as error:
        stored.response = response.broken(error)
    except Exception:  # isolates one request: whoever fetches it must get an answer
        log.exception("a background response failed")
        stored.response = response.broken(internal_error())
    finally:
        await deltas.aclose()
