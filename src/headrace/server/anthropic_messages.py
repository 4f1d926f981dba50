"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol.

Stream order: message_start, ping, the blocks one after another (start, deltas, stop), message_delta
with the stop reason and usage, message_stop. A request whose max_tokens does not fit behind its
prompt runs to the end of the context and says so in its stop reason, as the documented API does.
Pure but for the routes.
"""

import asyncio
import hashlib
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace.core.messages import Delta, GenerateRequest, SamplingParams, pack_ids
from headrace.frontend.requests import namespace
from headrace.server.admin import json_response
from headrace.server.answers import (
    Answer,
    Piece,
    Segment,
    listen,
    prompt_ids,
    room_for,
)
from headrace.server.anthropic_input import CountRequest, MessagesRequest, understand
from headrace.server.context import Context, Job, Stamp
from headrace.server.errors import anthropic_body
from headrace.server.generation import answer as serve
from headrace.server.generation import new_stamp, read_body
from headrace.server.ignored import warnings
from headrace.server.schemas import body_of, read
from headrace.server.sse import Wire, named_event

PING = named_event("ping")
WIRE = Wire(
    done=b"",
    failed=lambda error: named_event("error", **_without_type(anthropic_body(error))),
    idle=PING,
)


def _without_type(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "type"}


def routes(context: Context) -> APIRouter:
    """/v1/messages and /v1/messages/count_tokens."""
    router = APIRouter()

    @router.post("/v1/messages", openapi_extra=body_of(MessagesRequest))
    async def messages(http: Request) -> Response:
        """Anthropic's messages."""
        stamp = new_stamp("msg_")
        return await serve(http, context, lambda raw: parse(raw, context, stamp))

    @router.post("/v1/messages/count_tokens", openapi_extra=body_of(CountRequest))
    async def count_tokens(http: Request) -> Response:
        """How many tokens the same body has as a prompt."""
        raw = await read_body(http, context.config.serve)
        return await asyncio.to_thread(_count, raw, context)

    return router


def _count(raw: bytes, context: Context) -> Response:
    body = read(CountRequest, raw)
    context.check_model(body.model)
    chat, ignored = understand(body)
    headers = warnings(ignored, strict=context.config.serve.strict_fields)
    return json_response({"input_tokens": len(prompt_ids(chat, context))}, headers)


def parse(raw: bytes, context: Context, stamp: Stamp) -> Job:
    """The job that a body describes.

    Raises:
        BadRequest: names the field.
        NotFound: the model is not served here.
    """
    body = read(MessagesRequest, raw)
    context.check_model(body.model)
    chat, ignored = understand(body)
    ids = prompt_ids(chat, context)
    request = GenerateRequest(
        rid=stamp.id,
        ids=pack_ids(ids),
        sampling=_sampling(body, ids, context),
        stream=bool(body.stream),
        priority=body.priority,
        namespace=namespace(body.cache_salt, None),
    )
    request, answer, unenforced = listen(chat, request, context)
    message = Message(body, answer, context, stamp)
    reply = (MessageEvents if body.stream else MessageResult)(message)
    return Job([request], reply, stamp.id, ignored + unenforced, WIRE)


def _sampling(body: MessagesRequest, ids: list[int], context: Context) -> SamplingParams:
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "seed")}
    given["stop"] = tuple(body.stop_sequences) if body.stop_sequences is not None else None
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(
        context.openai_sampling, max_new_tokens=room_for(body.max_tokens, ids, context), **changes
    )


class Message:
    """The message of an answer, as far as it is known."""

    def __init__(
        self, body: MessagesRequest, answer: Answer, context: Context, stamp: Stamp
    ) -> None:
        self.answer = answer
        self._id = stamp.id
        self._model = body.model or context.model_name
        self._max_tokens = body.max_tokens
        self._report_cached = context.config.serve.enable_cache_report

    def to_dict(self) -> dict[str, Any]:
        """The message without its content."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            **self.ending(),
            "usage": self.usage(),
        }

    def ending(self) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`, both null while it runs."""
        delta = self.answer.last
        finish = delta.finish if delta else None
        reason, matched = None, None
        if finish is not None and delta is not None:
            reason = "end_turn"
            if finish.type == "length":
                cut = delta.completion_tokens < self._max_tokens
                reason = "model_context_window_exceeded" if cut else "max_tokens"
            elif isinstance(finish.matched, str):
                reason, matched = "stop_sequence", finish.matched
            elif self.answer.calls:
                reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": matched}

    def usage(self) -> dict[str, Any]:
        """Tokens so far; those found in the prefix cache are counted apart."""
        delta = self.answer.last or Delta("")
        cached = delta.cached_tokens if self._report_cached else 0
        return {
            "input_tokens": delta.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": delta.completion_tokens,
        }


class MessageEvents:
    """The streamed answer."""

    def __init__(self, message: Message) -> None:
        self._message = message

    def event(self, index: int, delta: Delta) -> bytes:
        message = self._message
        first = message.answer.last is None
        pieces = message.answer.read(delta)
        out = b""
        if first:
            start = {**message.to_dict(), "stop_reason": None, "stop_sequence": None}
            out = named_event("message_start", message=start) + PING
        out += b"".join([_block_event(piece) for piece in pieces])
        if delta.finish is not None:
            out += named_event("message_delta", delta=message.ending(), usage=message.usage())
            out += named_event("message_stop")
        return out

    def end(self) -> bytes:
        return b""


def _block_event(piece: Piece) -> bytes:
    segment = piece.segment
    number = segment.number
    if piece.what == "start":
        return named_event("content_block_start", index=number, content_block=_empty(segment))
    if piece.what == "more":
        return named_event("content_block_delta", index=number, delta=_growth(piece))
    out = b""
    if segment.kind == "reasoning":
        seal = {"type": "signature_delta", "signature": _signature(segment.text)}
        out = named_event("content_block_delta", index=number, delta=seal)
    return out + named_event("content_block_stop", index=number)


def _growth(piece: Piece) -> dict[str, Any]:
    if piece.segment.kind == "text":
        return {"type": "text_delta", "text": piece.text}
    if piece.segment.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "input_json_delta", "partial_json": piece.text}


class MessageResult:
    """The answer in one piece."""

    def __init__(self, message: Message) -> None:
        self._message = message

    def add(self, index: int, delta: Delta) -> None:
        self._message.answer.read(delta)

    def result(self) -> dict[str, Any]:
        blocks = [_block(segment) for segment in self._message.answer.segments]
        return {**self._message.to_dict(), "content": blocks}


def _empty(segment: Segment) -> dict[str, Any]:
    """The block of a segment that has just started."""
    if segment.kind == "text":
        return {"type": "text", "text": ""}
    if segment.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    id = segment.id or f"toolu_{segment.key}"
    return {"type": "tool_use", "id": id, "name": segment.name, "input": {}}


def _block(segment: Segment) -> dict[str, Any]:
    block = _empty(segment)
    if segment.kind == "text":
        return {**block, "text": segment.text}
    if segment.kind == "reasoning":
        return {**block, "thinking": segment.text, "signature": _signature(segment.text)}
    return {**block, "input": segment.arguments()}


def _signature(text: str) -> str:
    """A checksum of the reasoning; clients want one, nobody checks it here."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
