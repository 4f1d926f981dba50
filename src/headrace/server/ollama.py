"""/api/chat, /api/generate and their neighbors: Ollama's protocol.

A stream is lines of JSON, each with a piece, the last with counts and durations in nanoseconds. A
tool call comes whole. There is one model; it is always loaded, so an empty prompt answers at once.
Pure but for the routes and the clock that they pass in.
"""

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace import __version__
from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest, LogprobSpec, pack_ids
from headrace.frontend.requests import new_rid
from headrace.server.admin import json_response
from headrace.server.answers import (
    Answer,
    Chat,
    Segment,
    listen,
    prompt_ids,
    room_for,
    with_schema,
)
from headrace.server.context import Context, Job
from headrace.server.errors import ollama_body
from headrace.server.generation import send, take
from headrace.server.logprobs import chat_logprobs
from headrace.server.ollama_input import (
    ChatBody,
    CommonBody,
    GenerateBody,
    NameBody,
    chat_of_messages,
    chat_of_prompt,
    ignored_of,
    refuse,
    sampling_of,
    schema_of,
)
from headrace.server.schemas import body_of, read
from headrace.server.speech import dialects
from headrace.server.sse import Wire, to_json
from headrace.text.parsers.events import Content, Event

# The version of Ollama whose protocol this is: clients refuse to talk to an old one.
PROTOCOL = "0.12.0"
_NANO = 1_000_000_000


def line(value: Any) -> bytes:
    """One line of a stream."""
    return to_json(value) + b"\n"


WIRE = Wire("application/x-ndjson", done=b"", failed=lambda error: line(ollama_body(error)))


def routes(context: Context) -> APIRouter:
    """Generation, and what clients ask before it."""
    router = APIRouter()
    for add in (_add_generation, _add_models):
        add(router, context)
    return router


def _add_generation(router: APIRouter, context: Context) -> None:
    @router.post("/api/chat", openapi_extra=body_of(ChatBody))
    async def chat(http: Request) -> Response:
        """Ollama's chat."""
        started = time.time_ns()
        found = await take(http, context, lambda raw: parse_chat(raw, context), any_type=True)
        return await _reply(http, context, found, started)

    @router.post("/api/generate", openapi_extra=body_of(GenerateBody))
    async def generate(http: Request) -> Response:
        """Ollama's completion of one prompt."""
        started = time.time_ns()
        found = await take(http, context, lambda raw: parse_generate(raw, context), any_type=True)
        return await _reply(http, context, found, started)


class Asked(NamedTuple):
    """A body, understood. Without `ids` there is nothing to generate."""

    body: CommonBody
    chat: Chat | None
    ids: list[int]
    wrap: Callable[[dict[str, Any]], dict[str, Any]]


async def _reply(http: Request, context: Context, asked: Asked, started: int) -> Response:
    times = Times(started, time.time_ns)
    if not asked.ids:
        head = {"model": asked.body.model, "created_at": times.created_at()}
        done = {"done": True, "done_reason": "load"}
        return json_response({**head, **asked.wrap({"content": ""}), **done})
    return await send(http, context, job_of(asked, context, times))


def parse_chat(raw: bytes, context: Context) -> Asked:
    """What a body of /api/chat asks for. Raises BadRequest, NotFound."""
    body = read(ChatBody, raw)
    check_name(body.model, context)
    if not body.messages:
        return Asked(body, None, [], _as_message)
    chat = chat_of_messages(body)
    return Asked(body, chat, prompt_ids(chat, context), _as_message)


def parse_generate(raw: bytes, context: Context) -> Asked:
    """What a body of /api/generate asks for. Raises BadRequest, NotFound."""
    body = read(GenerateBody, raw)
    check_name(body.model, context)
    refuse(body)
    if not body.prompt:
        return Asked(body, None, [], _as_response)
    before = body.context or []
    if body.raw:
        ids = context.tokenizer("prompt").encode(body.prompt, add_special_tokens=not before)
        return Asked(body, None, before + ids, _as_response)
    chat = chat_of_prompt(body)
    return Asked(body, chat, before + prompt_ids(chat, context), _as_response)


def job_of(asked: Asked, context: Context, times: "Times") -> Job:
    """The job; a raw prompt's answer is text as it comes."""
    body, chat = asked.body, asked.chat
    sampling = sampling_of(body, context)
    fitted = room_for(sampling.max_new_tokens, asked.ids, context)
    sampling = msgspec.structs.replace(sampling, max_new_tokens=fitted)
    request = GenerateRequest(
        rid=new_rid(),
        ids=pack_ids(asked.ids),
        sampling=sampling if chat else with_schema(sampling, schema_of(body)),
        stream=body.stream is not False,
        logprobs=LogprobSpec(top=body.top_logprobs or 0) if body.logprobs else None,
    )
    answer = Answer(TextParser())
    if chat is not None:
        request, answer, _ = listen(chat, request, context)
    form = Form(asked, answer, context, times)
    reply = OllamaResult(form) if body.stream is False else OllamaEvents(form)
    return Job([request], reply, request.rid, ignored_of(body), WIRE)


class TextParser:
    """Everything is content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)]

    def finish(self) -> list[Event]:
        return []


class Times:
    """When a request came, and what time it is (unix nanoseconds)."""

    def __init__(self, started: int, clock: Callable[[], int]) -> None:
        self._started = started
        self._clock = clock

    def created_at(self) -> str:
        """Now, as Ollama writes it."""
        now = datetime.fromtimestamp(self._clock() / _NANO, UTC)
        return now.isoformat().replace("+00:00", "Z")

    def durations(self, delta: Delta) -> dict[str, int]:
        """What took how long, in nanoseconds; the model was already loaded."""
        total = max(0, self._clock() - self._started)
        first = min(total, int(delta.first_token_time * _NANO))
        waited = min(first, int(delta.queue_time * _NANO))
        return {
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": delta.prompt_tokens,
            "prompt_eval_duration": first - waited,
            "eval_count": delta.completion_tokens,
            "eval_duration": total - first,
        }


class Form:
    """The shape of an answer: of a chat or of a prompt."""

    def __init__(self, asked: Asked, answer: Answer, context: Context, times: Times) -> None:
        self.answer = answer
        self._wrap = asked.wrap
        self._model = asked.body.model
        self._times = times
        self._tokenizer = context.tokenizer("logprobs") if asked.body.logprobs else None
        self._ids = list(asked.ids) if isinstance(asked.body, GenerateBody) else None

    def note(self, delta: Delta) -> dict[str, Any]:
        """Log-probabilities of the tokens of a delta, if asked for."""
        if self._ids is not None:
            self._ids += delta.ids
        if self._tokenizer is None or delta.logprobs is None:
            return {}
        return {"logprobs": chat_logprobs(delta.logprobs, self._tokenizer)["content"]}

    def object(self, parts: dict[str, Any], done: bool = False) -> dict[str, Any]:
        """One line, or the whole answer."""
        head = {"model": self._model, "created_at": self._times.created_at()}
        return {**head, **self._wrap(parts), "done": done}

    def ending(self, delta: Delta) -> dict[str, Any]:
        """What the last line says besides `done`."""
        kept = {} if self._ids is None else {"context": self._ids}
        cut = delta.finish is not None and delta.finish.type == "length"
        return {
            "done_reason": "length" if cut else "stop",
            **kept,
            **self._times.durations(delta),
        }


class OllamaEvents:
    """The streamed answer."""

    def __init__(self, form: Form) -> None:
        self._form = form

    def event(self, index: int, delta: Delta) -> bytes:
        form, out = self._form, b""
        found = form.note(delta)
        for piece in form.answer.read(delta):
            segment = piece.segment
            if segment.kind == "call" and piece.what == "end":
                value = form.object({"content": "", "tool_calls": [_call(segment, form.answer)]})
            elif segment.kind != "call" and piece.what == "more":
                name = "content" if segment.kind == "text" else "thinking"
                value = form.object({"content": "", name: piece.text})
            else:
                continue
            out += line({**value, **found})
            found = {}
        if delta.finish is not None:
            out += line({**form.object({"content": ""}, done=True), **found, **form.ending(delta)})
        return out

    def end(self) -> bytes:
        return b""


class OllamaResult:
    """The answer in one piece."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._logprobs: dict[str, Any] = {}

    def add(self, index: int, delta: Delta) -> None:
        for name, values in self._form.note(delta).items():
            self._logprobs.setdefault(name, []).extend(values)
        self._form.answer.read(delta)

    def result(self) -> dict[str, Any]:
        form, answer = self._form, self._form.answer
        parts: dict[str, Any] = {"content": answer.text_of("text")}
        if thinking := answer.text_of("reasoning"):
            parts["thinking"] = thinking
        if answer.calls:
            parts["tool_calls"] = [_call(segment, answer) for segment in answer.calls]
        assert answer.last is not None
        return {**form.object(parts, done=True), **self._logprobs, **form.ending(answer.last)}


def _call(segment: Segment, answer: Answer) -> dict[str, Any]:
    function = {
        "index": answer.calls.index(segment),
        "name": segment.name,
        "arguments": segment.arguments(),
    }
    return {"id": segment.id or f"call_{segment.key}", "function": function}


def _as_message(parts: dict[str, Any]) -> dict[str, Any]:
    return {"message": {"role": "assistant", **parts}}


def _as_response(parts: dict[str, Any]) -> dict[str, Any]:
    return {"response": parts["content"], **{k: v for k, v in parts.items() if k != "content"}}


def check_name(name: str | None, context: Context) -> None:
    """Raise NotFound for another model's name, with --strict-model-name; a tag does not count."""
    given = (name or "").removesuffix(":latest")
    context.check_model(given if given != context.model_name.removesuffix(":latest") else None)


def _add_models(router: APIRouter, context: Context) -> None:
    card: dict[str, Any] = {}

    def model() -> dict[str, Any]:
        """What is known of the model; its files are looked at once."""
        if not card:
            card.update(_card(context))
        return card

    @router.get("/api/version")
    async def version() -> Response:
        """The version of Ollama's protocol, and ours."""
        return json_response({"version": PROTOCOL, "headrace": __version__})

    @router.get("/api/tags")
    async def tags() -> Response:
        """The one model."""
        return json_response({"models": [model()]})

    @router.get("/api/ps")
    async def running() -> Response:
        """The one model; it does not expire."""
        forever = "9999-12-31T23:59:59Z"
        state = {"expires_at": forever, "size_vram": 0, "context_length": context.context_length}
        return json_response({"models": [{**model(), **state}]})

    @router.post("/api/show", openapi_extra=body_of(NameBody))
    async def show(http: Request) -> Response:
        """Facts, template and abilities of the model."""
        body = await take(http, context, lambda raw: read(NameBody, raw), any_type=True)
        if not (name := body.model or body.name):
            raise BadRequest("model: must be given", field="model")
        check_name(name, context)
        return json_response(_details(context, model()))


def _card(context: Context) -> dict[str, Any]:
    """An entry of a list of models. The digest is of the names and sizes of its files."""
    folder = Path(context.config.model.model_path)
    files = sorted(path for path in folder.glob("*") if path.is_file())
    sizes = [(path.name, path.stat().st_size) for path in files]
    changed = max((path.stat().st_mtime for path in files), default=0.0)
    return {
        "name": context.model_name,
        "model": context.model_name,
        "modified_at": datetime.fromtimestamp(changed, UTC).isoformat(),
        "size": sum(size for _, size in sizes),
        "digest": hashlib.sha256(repr(sizes).encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": context.info.model_type,
            "families": [context.info.model_type],
            "parameter_size": "",
            "quantization_level": context.config.model.dtype,
        },
    }


def _details(context: Context, card: dict[str, Any]) -> dict[str, Any]:
    info, kind = context.info, context.info.model_type
    templates = context.manager.templates
    template = templates.source(False) if templates and templates.has_template else ""
    abilities = ["completion"]
    if templates and templates.supports_tools:
        abilities.append("tools")
    if dialects(context)[0]:
        abilities.append("thinking")
    facts = {
        "general.architecture": kind,
        f"{kind}.context_length": context.context_length,
        f"{kind}.embedding_length": info.hidden_size,
        f"{kind}.block_count": info.num_layers,
        f"{kind}.attention.head_count": info.num_heads,
        f"{kind}.attention.head_count_kv": info.num_kv_heads,
        f"{kind}.vocab_size": info.vocab_size,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": card["details"],
        "model_info": facts,
        "capabilities": abilities,
        "modified_at": card["modified_at"],
    }
