"""Ollama's bodies: what they may hold, how they become a prompt and sampling parameters. Pure."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import SamplingParams
from headrace.frontend.sampling import read_sampling
from headrace.server import shapes
from headrace.server.answers import Chat, call_of, json_text, thinking_variables
from headrace.server.context import Context
from headrace.server.schemas import Count, Objects, TokenIds, ignored_fields

_ROLES = ("system", "user", "assistant", "tool")
# Ollama's name of a sampling field -> ours. Other options set up a model, or are not built.
_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "num_predict": "max_new_tokens",
}


class NameBody(BaseModel):
    """POST /api/show and others that name a model; `name` is its older spelling."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class CommonBody(BaseModel):
    """Fields of /api/chat and /api/generate."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    # There is one model, and it stays.
    keep_alive: float | str | None = None


class ChatBody(CommonBody):
    """POST /api/chat."""

    messages: Annotated[Objects, shapes.OllamaMessages] | None = None
    tools: Annotated[Objects, shapes.ChatTools] | None = None


class GenerateBody(CommonBody):
    """POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: TokenIds | None = None
    suffix: str | None = None
    template: str | None = None
    images: list[Any] | None = None


def chat_of_messages(body: ChatBody) -> Chat:
    """The conversation of a chat.

    Raises:
        BadRequest: names the message that cannot be served.
    """
    messages = list(_messages(body.messages or []))
    return _chat(body, messages, body.tools or [])


def chat_of_prompt(body: GenerateBody) -> Chat:
    """A prompt and its system message as a conversation."""
    messages = [{"role": "system", "content": body.system}] if body.system else []
    messages.append({"role": "user", "content": body.prompt or ""})
    return _chat(body, messages, [])


def refuse(body: GenerateBody) -> None:
    """Raise for what would change the answer and is not built."""
    for name, why in _REFUSED.items():
        if getattr(body, name):
            raise Unsupported(f"{name}: {why}", field=name)


_REFUSED = {
    "images": "images are not supported; this model reads only text",
    "suffix": "fill-in-the-middle is not supported yet",
    "template": "the model's own template is used; send the whole prompt with raw instead",
}


def _chat(body: CommonBody, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Chat:
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools[{i}].function.name: must be a string", field="tools")
    return Chat(messages, tools, variables=_variables(body.think), schema=schema_of(body))


def schema_of(body: CommonBody) -> dict[str, Any] | None:
    """The JSON Schema that `format` asks for."""
    if not body.format:
        return None
    return {"type": "object"} if body.format == "json" else dict(body.format)


def _variables(think: bool | str | None) -> dict[str, Any]:
    """A level ("low", "high") also switches reasoning on."""
    if think is None:
        return {}
    level = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {**thinking_variables(bool(think)), **level}


def _messages(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calls have no ids in this protocol: they are numbered, and results take them in turn."""
    waiting: list[str] = []
    for i, message in enumerate(messages):
        where, role = f"messages[{i}]", message.get("role")
        if role not in _ROLES:
            raise BadRequest(
                f"{where}.role: must be one of {', '.join(_ROLES)}, not {role!r}",
                field=f"{where}.role",
            )
        if message.get("images"):
            raise Unsupported(f"{where}.images: {_REFUSED['images']}", field=f"{where}.images")
        found: dict[str, Any] = {"role": role, "content": message.get("content") or ""}
        if message.get("thinking"):
            found["reasoning_content"] = message["thinking"]
        if message.get("tool_calls"):
            found["tool_calls"] = list(_calls(message["tool_calls"], where, len(waiting)))
            waiting += [call["id"] for call in found["tool_calls"]]
        if role == "tool":
            found["tool_call_id"] = message.get("tool_call_id") or (
                waiting.pop(0) if waiting else ""
            )
            if name := message.get("tool_name") or message.get("name"):
                found["name"] = name
        yield found


def _calls(calls: Any, where: str, start: int) -> Iterator[dict[str, Any]]:
    for i, call in enumerate(calls if isinstance(calls, list) else [None]):
        place = f"{where}.tool_calls[{i}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{place}.name: must be a string", field=place)
        arguments = json_text(function.get("arguments") or {}, place)
        id = str(call.get("id") or f"call_{start + i}")
        yield call_of(id, function["name"], arguments)


def sampling_of(body: CommonBody, context: Context) -> SamplingParams:
    """`options` over the server's defaults. num_predict -1 and -2 mean until the context ends."""
    options = {name: value for name, value in (body.options or {}).items() if value is not None}
    changes: dict[str, Any] = {
        ours: options[name] for name, ours in _OPTIONS.items() if name in options
    }
    if changes.get("top_k") == 0:
        changes["top_k"] = -1
    if isinstance(seed := changes.get("seed"), int) and seed < 0:
        del changes["seed"]
    found = read_sampling({"max_new_tokens": None, **changes}, context.openai_sampling)
    most = found.max_new_tokens
    most = context.max_tokens(None if most is not None and most < 0 else most, None)
    return msgspec.structs.replace(found, max_new_tokens=most)


def ignored_of(body: CommonBody) -> list[str]:
    """Names of fields and options without effect."""
    options = [f"options.{name}" for name in body.options or () if name not in _OPTIONS]
    kept = ["keep_alive"] if body.keep_alive is not None else []
    return ignored_fields(body) + options + kept
