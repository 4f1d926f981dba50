"""Anthropic's bodies: what they may hold, and how their blocks become messages for a chat template.

System messages stay where the client put them, so that a prefix of the conversation stays a prefix
of the prompt. Blocks that are no text are refused by name; server tools, which nobody runs here,
are left out and reported. Pure.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from headrace.core.errors import BadRequest, Unsupported
from headrace.server import shapes
from headrace.server.answers import Chat, call_of, json_text, text_only, thinking_variables, tool_of
from headrace.server.schemas import Count, Int64, Objects, Prompts, ignored_fields


class Thinking(BaseModel):
    """Whether to reason. A budget cannot be kept and is reported."""

    model_config = ConfigDict(extra="allow")

    type: Literal["enabled", "disabled", "adaptive"]


class ToolChoice(BaseModel):
    """Which tools the model may or must call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(BaseModel):
    """The JSON Schema of the answer."""

    model_config = ConfigDict(extra="allow")

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """Effort and format of the answer."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(BaseModel):
    """POST /v1/messages/count_tokens, and what /v1/messages has in common with it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    messages: Annotated[Objects, shapes.AnthropicMessages]
    system: str | Objects | None = None
    tools: Annotated[Objects, shapes.AnthropicTools] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[Count, Field(ge=1)]
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    stop_sequences: Prompts | None = None
    # Extras, as on the OpenAI routes.
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: Int64 | None = None
    seed: Int64 | None = None


class Understood(NamedTuple):
    """The conversation, and the names of what had to be left out."""

    chat: Chat
    ignored: list[str]


def understand(body: CountRequest) -> Understood:
    """The conversation of a body.

    Raises:
        BadRequest: names the message and block that cannot be served.
    """
    if not body.messages:
        raise BadRequest("messages: must hold at least one message", field="messages")
    for name in ("mcp_servers", "container"):
        if getattr(body, name):
            raise Unsupported(f"{name}: this server runs no tools of its own", field=name)
    ignored = ignored_fields(body)
    messages = list(_system(body.system))
    for i, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{i}]", ignored)
    tools = list(_tools(body.tools or [], ignored))
    shape = body.output_format or (body.output_config.format if body.output_config else None)
    chat = Chat(
        messages,
        tools,
        _choice(body.tool_choice, tools),
        _variables(body),
        continues=_is_prefill(messages[-1]),
        schema=shape.schema_ if shape else None,
        parallel=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
    )
    return Understood(chat, ignored)


def _variables(body: CountRequest) -> dict[str, Any]:
    """Without `thinking` the template decides, as for every other protocol."""
    given: dict[str, Any] = {}
    if body.thinking is not None:
        given = thinking_variables(body.thinking.type != "disabled")
    if body.output_config is not None and body.output_config.effort is not None:
        given["reasoning_effort"] = body.output_config.effort
    return given | (getattr(body, "chat_template_kwargs", None) or {})


def _system(system: str | list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": _texts(system, "system")}


def _is_prefill(message: dict[str, Any]) -> bool:
    """An answer that has begun is gone on with."""
    return bool(
        message["role"] == "assistant" and "tool_calls" not in message and message["content"]
    )


def _messages(message: dict[str, Any], where: str, ignored: list[str]) -> Iterator[dict[str, Any]]:
    """The messages of a template for one of the client: tool results are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(
            f"{where}.role: must be user, assistant or system, not {role!r}", field=f"{where}.role"
        )
    blocks = _blocks(content, f"{where}.content")
    if role == "assistant":
        yield _assistant(blocks, f"{where}.content", ignored)
        return
    texts: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        place = f"{where}.content[{i}]"
        if block["type"] != "tool_result":
            texts.append(_text_part(block, place))
            continue
        if texts:
            yield {"role": role, "content": texts}
            texts = []
        yield _tool_result(block, place)
    if texts or not blocks:
        yield {"role": role, "content": _plain(texts)}


def _assistant(blocks: list[dict[str, Any]], where: str, ignored: list[str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        place = f"{where}[{i}]"
        if block["type"] == "thinking":
            thoughts.append(_string(block, "thinking", place))
        elif block["type"] == "redacted_thinking":
            ignored.append(place)
        elif block["type"] == "tool_use":
            arguments = json_text(block.get("input") or {}, f"{place}.input")
            name = _string(block, "name", place)
            calls.append(call_of(_string(block, "id", place), name, arguments))
        else:
            texts.append(_text_part(block, place))
    message: dict[str, Any] = {"role": "assistant", "content": _plain(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_result(block: dict[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    found = "" if content is None else _texts(content, f"{where}.content")
    if block.get("is_error"):
        text = found if isinstance(found, str) else "\n".join(part["text"] for part in found)
        found = f"Error: {text}"
    id = _string(block, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": id, "content": found}


def _texts(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text, or text parts of several blocks."""
    if isinstance(content, str):
        return content
    blocks = _blocks(content, where)
    return _plain([_text_part(block, f"{where}[{i}]") for i, block in enumerate(blocks)])


def _plain(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One part is a string, which every template takes."""
    if len(parts) > 1:
        return parts
    return str(parts[0]["text"]) if parts else ""


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{where}: must be a string or a list of blocks", field=where)
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            place = f"{where}[{i}]"
            raise BadRequest(f"{place}: must be an object with a type", field=place)
    return content


def _text_part(block: dict[str, Any], where: str) -> dict[str, Any]:
    """The text of a block: of text, of a document that is text, of a search result."""
    kind = block["type"]
    if kind == "text":
        text = _string(block, "text", where)
    elif kind == "document" and _source_type(block) == "text":
        text = _titled(block, _string(block["source"], "data", f"{where}.source"))
    elif kind == "search_result":
        text = _titled(block, _joined(block.get("content"), f"{where}.content"))
    else:
        raise text_only(kind, where)
    return {"type": "text", "text": text}


def _source_type(block: dict[str, Any]) -> Any:
    source = block.get("source")
    return source.get("type") if isinstance(source, dict) else None


def _titled(block: dict[str, Any], text: str) -> str:
    head = [part for part in (block.get("title"), block.get("source")) if isinstance(part, str)]
    return "\n".join([*head, text])


def _joined(content: Any, where: str) -> str:
    found = _texts(content, where)
    return found if isinstance(found, str) else "\n".join(part["text"] for part in found)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name}: must be a string", field=f"{where}.{name}")
    return value


def _tools(tools: list[dict[str, Any]], ignored: list[str]) -> Iterator[dict[str, Any]]:
    for i, tool in enumerate(tools):
        if tool.get("type", "custom") not in (None, "custom"):
            ignored.append(f"tools[{i}]")
            continue
        name, schema = _string(tool, "name", f"tools[{i}]"), tool.get("input_schema")
        if not isinstance(schema, dict):
            place = f"tools[{i}].input_schema"
            raise BadRequest(f"{place}: must be an object", field=place)
        strict = {"strict": True} if tool.get("strict") is True else {}
        yield tool_of(name, tool.get("description"), schema, **strict)


def _choice(choice: ToolChoice | None, tools: list[dict[str, Any]]) -> str | dict[str, Any]:
    if choice is None or choice.type in ("auto", "none"):
        return choice.type if choice else "auto"
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise BadRequest("tool_choice: there are no tools to choose from", field="tool_choice")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise BadRequest(
            f"tool_choice.name: {choice.name!r} is not one of the tools", field="tool_choice"
        )
    return {"type": "function", "function": {"name": choice.name}}
