"""Dialects whose arguments are JSON: Hermes, Llama 3, Mistral, DeepSeek, Kimi K2.

The formats are those of the chat templates that these models are published with.
"""

import re
from contextlib import suppress

from headrace.text.parsers.calls import Markers, Reader
from headrace.text.parsers.json_text import loads, pass_json, take_json
from headrace.text.parsers.source import Mismatch, Source, Wait

# Qwen 2.5 and 3, Hermes 2 Pro and many more.
HERMES = Markers("<tool_call>", ("</tool_call>",))
LLAMA3_TAG = "<|python_tag|>"
DEEPSEEK_SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
MISTRAL = Markers("[TOOL_CALLS]", inside=("[ARGS]", "[CALL_ID]"), special=True)
DEEPSEEK = Markers(
    call="<\uff5ctool\u2581call\u2581begin\uff5c>",
    ends=("<\uff5ctool\u2581call\u2581end\uff5c>",),
    opens="<\uff5ctool\u2581calls\u2581begin\uff5c>",
    closes="<\uff5ctool\u2581calls\u2581end\uff5c>",
    inside=(DEEPSEEK_SEPARATOR,),
    special=True,
)
KIMI = Markers(
    call="<|tool_call_begin|>",
    ends=("<|tool_call_end|>",),
    opens="<|tool_calls_section_begin|>",
    closes="<|tool_calls_section_end|>",
    inside=(KIMI_ARGUMENTS,),
    special=True,
)

_ARGUMENTS = ("arguments", "parameters")
_CALL_KEYS = {"type", "id", "name", *_ARGUMENTS}
_IDENTIFIER = re.compile(r"[A-Za-z0-9]")


def hermes(reader: Reader) -> Wait[None]:
    """{"name": ..., "arguments": {...}}"""
    yield from json_call(reader, strict=False)


def json_calls(reader: Reader) -> Wait[None]:
    """Objects as of `json_call`, in a list or one after another, possibly with ; or , between."""
    source = reader.source
    yield from source.spaces()
    in_list = yield from source.matches("[")
    while True:
        yield from json_call(reader, strict=True)
        yield from source.spaces()
        yield from source.match((";", ","))
        yield from source.spaces()
        if (yield from source.peek()) != "{":
            break
    if in_list and (yield from source.matches("]")):
        source.drop()
        yield from source.spaces()
    if not (yield from source.more()):
        source.drop()


def mistral(reader: Reader) -> Wait[None]:
    """[{"name": ..., "arguments": {...}}, ...] up to v7; later name[CALL_ID]id[ARGS]{...}."""
    source = reader.source
    yield from source.spaces()
    if not (yield from source.matches("[")):
        name = yield from reader.name()
        id = ""
        if (yield from source.matches("[CALL_ID]")):
            id = yield from source.run(_IDENTIFIER, 64)
        yield from source.matches("[ARGS]")
        yield from reader.arguments(name, id)
        return
    while True:
        yield from json_call(reader, strict=False)
        yield from source.spaces()
        if not (yield from source.matches(",")):
            break
    if (yield from source.matches("]")):
        source.drop()


def deepseek(reader: Reader) -> Wait[None]:
    """V3: function SEP name, then the arguments as a fenced block. V3.1: name SEP arguments."""
    source = reader.source
    name = yield from reader.name()
    yield from source.expect((DEEPSEEK_SEPARATOR,))
    if (yield from source.peek()) not in ("{", " ", "\n", ""):
        name = yield from reader.name()
        yield from source.spaces()
        yield from source.expect(("```json",))
    yield from reader.arguments(name)
    yield from source.spaces()
    if (yield from source.matches("```")):
        source.drop()


def kimi(reader: Reader) -> Wait[None]:
    """functions.name:number, which is also the id of the call, then the arguments."""
    source = reader.source
    id = yield from reader.name()
    yield from source.spaces()
    yield from source.expect((KIMI_ARGUMENTS,))
    name = re.sub(r":\d+$", "", id.removeprefix("functions."))
    if not name:
        raise Mismatch
    yield from reader.arguments(name, id)


def json_call(reader: Reader, *, strict: bool) -> Wait[None]:
    """One object with the name and the arguments of a call, in any order.

    `strict`, where no marker announces a call: only the keys of a call, only names of given tools.

    Raises:
        Mismatch: it is no call; or, once the call has begun, its arguments are wrong.
    """
    source = reader.source
    yield from source.spaces()
    yield from source.expect(("{",))
    found: dict[str, str] = {}
    begun = False
    while True:
        key = yield from _key(source)
        if strict and key not in _CALL_KEYS:
            raise Mismatch
        if key in _ARGUMENTS and "name" in found and not begun:
            yield from _pass_arguments(reader, _text(found["name"]), _text(found.get("id", '""')))
            begun = True
        else:
            found["arguments" if key in _ARGUMENTS else key] = yield from take_json(source)
            if key == "name":
                _check_name(reader, found["name"], strict)
        yield from source.spaces()
        mark = yield from source.match((",", "}"))
        if mark != ",":
            break
    if begun:
        if mark:
            source.drop()
    elif mark and "name" in found:
        arguments = _object_text(found.get("arguments", "null"))
        reader.begin(_text(found["name"]), _text(found.get("id", '""')))
        reader.write(arguments)
    else:
        raise Mismatch


def _key(source: Source) -> Wait[str]:
    yield from source.spaces()
    if (yield from source.peek()) != '"':
        raise Mismatch
    key = yield from take_json(source)
    yield from source.spaces()
    yield from source.expect((":",))
    yield from source.spaces()
    return _text(key)


def _check_name(reader: Reader, text: str, strict: bool) -> None:
    name = _text(text)
    if not reader.is_name(name) or (strict and name not in reader.tools):
        raise Mismatch


def _pass_arguments(reader: Reader, name: str, id: str) -> Wait[None]:
    if (yield from reader.source.peek()) == "{":
        reader.begin(name, id)
        yield from pass_json(reader.source, reader.out.arguments)
        return
    arguments = _object_text((yield from take_json(reader.source)))
    reader.begin(name, id)
    reader.write(arguments)


def _object_text(text: str) -> str:
    """JSON text of arguments, if they are an object; some models write it as a string, or null."""
    with suppress(ValueError):
        value = loads(text)
        if isinstance(value, str):
            value, text = loads(value), value
            text.encode()
        if value is None:
            return "{}"
        if isinstance(value, dict):
            return text
    raise Mismatch


def _text(text: str) -> str:
    """A JSON string's text, "" for anything else."""
    with suppress(ValueError):
        value = loads(text)
        if isinstance(value, str):
            value.encode()
            return value
    return ""
