"""The usual form of messages and tools, for the OpenAPI document alone.

Bodies take these as plain objects, because chat templates and adapters read them and name what is
wrong; a reader of the document, and a fuzzer, want to know what is in them. Checks nothing.
"""

from typing import Any

import msgspec
from pydantic import WithJsonSchema

from headrace.core.messages import SamplingParams
from headrace.frontend.native import native_schema

Shape = dict[str, Any]
_TEXT: Shape = {"type": "string"}
_ANY_OBJECT: Shape = {"type": "object"}
_TRUTH: Shape = {"type": "boolean"}


def _object(required: str, **properties: Shape) -> Shape:
    return {"type": "object", "properties": properties, "required": required.split()}


def _list(*items: Shape) -> Shape:
    return {"type": "array", "items": items[0] if len(items) == 1 else {"anyOf": list(items)}}


def _one_of(*values: str) -> Shape:
    return {"enum": list(values)}


def _or_text(shape: Shape) -> Shape:
    return {"anyOf": [_TEXT, shape]}


_PART = _object("type text", type=_one_of("text"), text=_TEXT)
_CALL = _object(
    "id type function",
    id=_TEXT,
    type=_one_of("function"),
    function=_object("name arguments", name=_TEXT, arguments=_TEXT),
)
_FUNCTION = {"name": _TEXT, "description": _TEXT, "parameters": _ANY_OBJECT, "strict": _TRUTH}
_BLOCKS = (
    _PART,
    _object("type thinking", type=_one_of("thinking"), thinking=_TEXT, signature=_TEXT),
    _object(
        "type id name input", type=_one_of("tool_use"), id=_TEXT, name=_TEXT, input=_ANY_OBJECT
    ),
    _object(
        "type tool_use_id",
        type=_one_of("tool_result"),
        tool_use_id=_TEXT,
        content=_or_text(_list(_PART)),
        is_error=_TRUTH,
    ),
)
_ITEM_PART = _object("type text", type=_one_of("input_text", "output_text"), text=_TEXT)

ChatMessages = WithJsonSchema(
    _list(
        _object(
            "role",
            role=_one_of("system", "developer", "user", "assistant", "tool"),
            content={"anyOf": [_TEXT, _list(_PART), {"type": "null"}]},
            reasoning_content=_TEXT,
            tool_calls=_list(_CALL),
            tool_call_id=_TEXT,
            name=_TEXT,
        )
    )
)
ChatTools = WithJsonSchema(
    _list(_object("type function", type=_one_of("function"), function=_object("name", **_FUNCTION)))
)
AnthropicMessages = WithJsonSchema(
    _list(
        _object(
            "role content",
            role=_one_of("user", "assistant", "system"),
            content=_or_text(_list(*_BLOCKS)),
        )
    )
)
AnthropicTools = WithJsonSchema(
    _list(_object("name", name=_TEXT, description=_TEXT, input_schema=_ANY_OBJECT))
)
Items = WithJsonSchema(
    _list(
        _object(
            "role content",
            type=_one_of("message"),
            role=_one_of("system", "developer", "user", "assistant"),
            content=_or_text(_list(_ITEM_PART)),
        ),
        _object(
            "type call_id name arguments",
            type=_one_of("function_call"),
            call_id=_TEXT,
            name=_TEXT,
            arguments=_TEXT,
        ),
        _object(
            "type call_id output",
            type=_one_of("function_call_output"),
            call_id=_TEXT,
            output=_or_text(_list(_ITEM_PART)),
        ),
    )
)
ItemTools = WithJsonSchema(
    _list(
        _object("type name", type=_one_of("function"), **_FUNCTION),
        _object("type name", type=_one_of("custom"), name=_TEXT, description=_TEXT),
    )
)
OllamaMessages = WithJsonSchema(
    _list(
        _object(
            "role",
            role=_one_of("system", "user", "assistant", "tool"),
            content=_TEXT,
            thinking=_TEXT,
            tool_name=_TEXT,
            tool_calls=_list(
                _object("function", function=_object("name", name=_TEXT, arguments=_ANY_OBJECT))
            ),
        )
    )
)


def generate_body() -> Shape:
    """The body of /generate."""
    sampling = {
        field.name: msgspec.json.schema(field.type)
        for field in msgspec.structs.fields(SamplingParams)
    }
    parameters: Shape = {"type": "object", "properties": sampling, "additionalProperties": False}
    body = native_schema()
    body["properties"]["sampling_params"] = {"anyOf": [parameters, _list(parameters)]}
    return body


def encode_body() -> Shape:
    """The body of /encode and /classify: texts, pairs of them, or token ids."""
    ids = _list({"type": "integer", "minimum": 0})
    return _object(
        "",
        text={"anyOf": [_TEXT, _list(_TEXT, _list(_TEXT))]},
        input_ids={"anyOf": [ids, _list(ids)]},
        rid=_or_text(_list(_TEXT)),
        priority={"type": "integer"},
        dimensions={"type": "integer", "minimum": 1},
    )
