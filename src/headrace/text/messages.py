"""Chat messages as clients send them, in the form a chat template reads.

Pure: copies, never changes what it is given. Does not render and does not know HTTP. Anything
that cannot be kept is a `BadRequest` that names the place, never dropped.
"""

import json
from typing import Any

from headrace.core.errors import BadRequest
from headrace.text.template import ChatTemplate

MAX_DEPTH = 64
# The key of arguments that are no JSON object.
UNREADABLE = "partial_json"
# Names under which clients and templates know the reasoning of an assistant message.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def normalize_messages(
    messages: list[dict[str, Any]], template: ChatTemplate
) -> list[dict[str, Any]]:
    """A copy of `messages` in the shape `template` expects; keys whose value is None are left
    out."""
    if not messages:
        raise BadRequest("messages must hold at least one message", field="messages")
    return [
        _normalize_message(message, f"messages[{i}]", template)
        for i, message in enumerate(messages)
    ]


def plain_json(value: Any, field: str, depth: int = 0) -> Any:
    """A deep copy of a value made of JSON types only, so that a template meets no foreign
    methods."""
    if depth > MAX_DEPTH:
        raise BadRequest(f"{field} is nested deeper than {MAX_DEPTH} levels", field=field)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(k): plain_json(v, field, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v, field, depth + 1) for v in value]
    raise BadRequest(f"{field} holds a {type(value).__name__}, which is not JSON", field=field)


def _normalize_message(message: Any, field: str, template: ChatTemplate) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRequest(f"{field} must be an object", field=field)
    if not isinstance(message.get("role"), str):
        raise BadRequest(f"{field}.role must be a string", field=f"{field}.role")
    plain = plain_json({k: v for k, v in message.items() if v is not None}, field)
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{field}.content", template)
    for i, call in enumerate(plain.get("tool_calls") or []):
        _set_arguments(call, f"{field}.tool_calls[{i}]", template.string_arguments)
    return _with_reasoning_names(plain)


def _content(content: Any, field: str, template: ChatTemplate) -> Any:
    """Content as a string, or as the text parts of a template that walks over parts."""
    if isinstance(content, str):
        return content if template.takes_string_content else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{field} must be a string or a list of parts", field=field)
    texts = [_part_text(part, f"{field}[{i}]") for i, part in enumerate(content)]
    # A space between parts, as SGLang: words of two parts must not run together.
    return " ".join(texts) if template.content_format == "string" else content


def _part_text(part: Any, field: str) -> str:
    if not isinstance(part, dict):
        raise BadRequest(f"{field} must be an object with a type", field=field)
    if part.get("type") != "text":
        raise BadRequest(
            f"{field} has the type {part.get('type')!r}; this model reads only text parts",
            field=f"{field}.type",
        )
    if not isinstance(part.get("text"), str):
        raise BadRequest(f"{field}.text must be a string", field=f"{field}.text")
    return str(part["text"])


def _set_arguments(call: Any, field: str, as_text: bool) -> None:
    """OpenAI sends arguments as JSON text; most templates want the object in it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRequest(f"{field}.function must be an object", field=f"{field}.function")
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, dict):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = read_arguments(arguments)
        function["arguments"] = plain_json(arguments, f"{field}.function.arguments")


def read_arguments(text: str) -> dict[str, Any]:
    """The object that the arguments of a call describe.

    Agents send back what a model wrote, also what a length limit has cut: that stays readable for
    the model under `UNREADABLE`, where any template can walk over it.
    """
    try:
        value = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return {UNREADABLE: text}
    if value is None:
        return {}
    return value if isinstance(value, dict) else {UNREADABLE: text}


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[n] for n in _REASONING_NAMES if message.get(n) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
