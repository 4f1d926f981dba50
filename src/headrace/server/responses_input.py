"""Bodies of /v1/responses: what they may hold, and how their items become messages.

Items of one turn of the assistant (reasoning, text, calls) become one message. Tools that a server
would run itself are left out and reported: clients always list them. Pure.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from headrace.core.errors import BadRequest, Unsupported
from headrace.server import shapes
from headrace.server.answers import Chat, call_of, json_text, text_only, thinking_variables, tool_of
from headrace.server.schemas import Count, Int64, Objects, Prompts, RequestId, ignored_fields

LOGPROBS = "message.output_text.logprobs"
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_CUSTOM_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


class TextFormat(BaseModel):
    """Text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(extra="allow")

    format: TextFormat | None = None


class ReasoningConfig(BaseModel):
    """How much to reason; "none" not at all."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None


class ResponsesRequest(BaseModel):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    input: str | Annotated[Objects, shapes.Items]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    max_output_tokens: Annotated[Count, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Count | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: Annotated[Objects, shapes.ItemTools] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    # Shown again in the response, without other effect.
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    max_tool_calls: Count | None = None
    # Refused.
    conversation: Any = None
    prompt: Any = None
    # Extras of SGLang.
    request_id: RequestId | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | Prompts | None = None
    seed: Int64 | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: Int64 | None = None


class Understood(NamedTuple):
    """The conversation, the new items, names of tools with free text, what was left out."""

    chat: Chat
    inputs: list[dict[str, Any]]
    custom: frozenset[str]
    ignored: list[str]


def understand(body: ResponsesRequest, history: Sequence[dict[str, Any]]) -> Understood:
    """The conversation of a body that goes on after the items of `history`.

    Raises:
        BadRequest: names the item that cannot be served.
    """
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise Unsupported(f"{name}: not supported; send the items as input", field=name)
    text = body.text.model_dump() if body.text else None
    json_text([body.tools, body.tool_choice, body.input, text], "input")  # they are shown again
    ignored = ignored_fields(body) + list(_without_effect(body))
    inputs: list[dict[str, Any]]
    if isinstance(body.input, str):
        inputs = [{"type": "message", "role": "user", "content": body.input}]
    else:
        inputs = body.input
    if not inputs:
        raise BadRequest("input: must not be empty", field="input")
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += Turns(len(history)).read([*history, *inputs])
    offered, choice = _offered(body)
    tools = list(_tools(offered, ignored))
    chat = Chat(
        messages,
        tools,
        _choice(choice, tools),
        _variables(body),
        schema=_schema(body.text),
        parallel=body.parallel_tool_calls is not False,
    )
    custom = frozenset(str(tool.get("name")) for tool in offered if tool.get("type") == "custom")
    return Understood(chat, inputs, custom, ignored)


def _without_effect(body: ResponsesRequest) -> Iterator[str]:
    """Names of declared fields whose value cannot be honored."""
    if body.truncation == "auto":
        yield "truncation"
    if any(name != LOGPROBS for name in body.include or ()):
        yield "include"


def _variables(body: ResponsesRequest) -> dict[str, Any]:
    effort = body.reasoning.effort if body.reasoning else None
    given: dict[str, Any] = {}
    if effort == "none":
        given = thinking_variables(False)
    elif effort is not None:
        given = {"reasoning_effort": effort}
    return given | (body.chat_template_kwargs or {})


def _schema(text: TextConfig | None) -> dict[str, Any] | None:
    form = text.format if text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.schema_ is None:
        raise BadRequest("text.format.schema: must be given", field="text")
    return form.schema_


class Turns:
    """Items -> messages; items of the assistant that follow one another are put together.

    The first `before` items come from the store, so that errors count those of the client.
    """

    def __init__(self, before: int) -> None:
        self._before = before
        self._messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def read(self, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """All messages."""
        for i, item in enumerate(items):
            self._add(item, f"input[{i - self._before}]")
        return self._messages

    def _add(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type") or "message"
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            self._reasoning(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, kind, where)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            id = _string(item, "call_id", where)
            content = _content(item.get("output"), f"{where}.output")
            message = {"role": "tool", "tool_call_id": id, "content": content}
            if name := self._names.get(id):
                message["name"] = name
            self._messages.append(message)
        else:
            raise BadRequest(f"{where}: items of type {kind!r} are not supported", field=where)

    def _message(self, item: dict[str, Any], where: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            raise BadRequest(
                f"{where}.role: must be one of {', '.join(_ROLES)}, not {item.get('role')!r}",
                field=f"{where}.role",
            )
        content = _content(item.get("content"), f"{where}.content")
        if role == "assistant":
            self._assistant(unless=("content", "tool_calls"))["content"] = content
        else:
            self._messages.append({"role": role, "content": content})

    def _reasoning(self, item: dict[str, Any], where: str) -> None:
        """What has only an encrypted form is of another server and cannot be read."""
        parts = item.get("content") or item.get("summary") or []
        text = _joined(_content(parts, f"{where}.content"))
        if text:
            message = self._assistant(unless=("content", "tool_calls", "reasoning_content"))
            message["reasoning_content"] = text

    def _call(self, item: dict[str, Any], kind: str, where: str) -> None:
        id, name = _string(item, "call_id", where), _string(item, "name", where)
        if kind == "function_call":
            arguments = _string(item, "arguments", where)
        else:
            arguments = json_text({"input": _string(item, "input", where)}, where)
        self._names[id] = name
        message = self._assistant(unless=())
        message.setdefault("tool_calls", []).append(call_of(id, name, arguments))

    def _assistant(self, unless: tuple[str, ...]) -> dict[str, Any]:
        """The message of this turn: the last one, unless it already has one of these."""
        last = self._messages[-1] if self._messages else {}
        if last.get("role") != "assistant" or any(last.get(name) for name in unless):
            last = {"role": "assistant", "content": ""}
            self._messages.append(last)
        return last


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, or text parts for a template that walks over them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: must be a string or a list of parts", field=where)
    parts = [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    return str(parts[0]["text"]) if len(parts) == 1 else parts or ""


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise BadRequest(f"{where}: must be an object with a type", field=where)
    if part.get("type") == "refusal":
        return {"type": "text", "text": _string(part, "refusal", where)}
    if part.get("type") not in _TEXT_PARTS:
        raise text_only(part.get("type"), where)
    return {"type": "text", "text": _string(part, "text", where)}


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name}: must be a string", field=f"{where}.{name}")
    return value


def _offered(body: ResponsesRequest) -> tuple[list[dict[str, Any]], Any]:
    """(tools, choice); `allowed_tools` narrows the former."""
    tools, choice = body.tools or [], body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
            raise BadRequest("tool_choice.tools: must be a list of tools", field="tool_choice")
        names = [tool.get("name") for tool in allowed]
        return [tool for tool in tools if tool.get("name") in names], choice.get("mode")
    return tools, choice


def _tools(tools: list[dict[str, Any]], ignored: list[str]) -> Iterator[dict[str, Any]]:
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.get("type") == "function":
            strict = {"strict": True} if tool.get("strict") else {}
            name = _string(tool, "name", where)
            yield tool_of(name, tool.get("description"), tool.get("parameters"), **strict)
        elif tool.get("type") == "custom":
            yield tool_of(_string(tool, "name", where), _explained(tool), _CUSTOM_INPUT)
        else:
            ignored.append(where)


def _explained(tool: dict[str, Any]) -> str:
    """The description of a tool that takes free text, with the grammar of that text."""
    text, form = str(tool.get("description") or ""), tool.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        text += f"\nThe input must follow this {form.get('syntax')} grammar:\n"
        text += str(form.get("definition"))
    return text


def _choice(choice: Any, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    if choice in (None, "auto", "none"):
        return choice or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and names:
        return "required"
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        if choice.get("name") in names:
            return {"type": "function", "function": {"name": choice["name"]}}
        raise BadRequest(
            f"tool_choice: {choice.get('name')!r} is not one of the tools", field="tool_choice"
        )
    raise BadRequest("tool_choice: there is no such tool to choose", field="tool_choice")
