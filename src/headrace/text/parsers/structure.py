"""What must be generated when calls are forced or strict: a structural tag in the model's dialect.

    {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": [...],
     "tags": [{"type": "tag", "begin": ..., "content": ..., "end": ...}, ...],
     "at_least_one": true, "stop_after_first": false}}

A tag is one call of one tool: the text before the arguments, the arguments by their schema, the
text after them. Marks that are special tokens are written as their text. Dialects that do not
write JSON get the arguments one by one, in the order of the schema and no others; their strings
are free text unless the schema has an enum, const or pattern. Without a dialect the calls are a
JSON list, as SGLang has it, and `JSON_CALLS` reads it.
"""

import re
from collections.abc import Callable
from typing import Any

from headrace.text.parsers import harmony, json_calls, python_calls, tagged_calls
from headrace.text.parsers.json_text import dumps
from headrace.text.parsers.tagged_calls import Tags

Format = dict[str, Any]
ANY_OBJECT: Format = {"type": "object"}


def structure(
    dialect: str,
    tools: list[dict[str, Any]],
    choice: str | dict[str, Any],
    parallel: bool = True,
    answer: Any = None,
) -> dict[str, Any] | None:
    """The structural tag for a request, None if nothing is to be enforced.

    `dialect` is a value of TOOL_DIALECTS. `choice` is OpenAI's tool_choice: "required" and a named
    function force calls; with "auto" only calls of `strict` tools follow their schemas. Not
    `parallel`: one call at most. `answer` is the JSON schema of an answer that is no call. A
    dialect that cannot say that gives None, see `enforces`.
    """
    functions = _callable(tools, choice)
    forced = choice not in ("auto", "none")
    strict = any(function.get("strict") for function in functions)
    wanted = forced or strict or not parallel or answer is not None
    if choice == "none" or not functions or not wanted or not enforces(dialect, choice):
        return None
    once = isinstance(choice, dict) or not parallel
    if not dialect:
        return _tagged(_json_list(functions, once))
    if dialect == harmony.HARMONY:
        return _tagged(_harmony(functions, forced, answer))
    calls = {
        "type": "triggered_tags",
        "triggers": [_TRIGGERS[dialect]],
        "tags": [_call(dialect, function, forced) for function in functions],
        "at_least_one": forced or answer is not None,
        "stop_after_first": once,
    }
    return _tagged(calls if forced or answer is None else _or(_json(answer), calls))


def _callable(tools: list[dict[str, Any]], choice: str | dict[str, Any]) -> list[dict[str, Any]]:
    functions = [tool.get("function") or tool for tool in tools]
    if not isinstance(choice, dict):
        return functions
    return [one for one in functions if one["name"] == choice["function"]["name"]]


def _call(dialect: str, function: dict[str, Any], forced: bool) -> Format:
    """The tag of one tool."""
    return _TAGS[dialect](function["name"], _followed(function, forced))


def enforces(dialect: str, choice: str | dict[str, Any]) -> bool:
    """Whether `structure` can say what `choice` asks. With "auto" it cannot for a model without a
    dialect: nothing that it writes is a call."""
    return choice not in ("auto", "none") or dialect in _TAGS or dialect == harmony.HARMONY


def _tagged(format: Format) -> dict[str, Any]:
    return {"type": "structural_tag", "format": format}


def _tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _json(schema: Any) -> Format:
    return {"type": "json_schema", "json_schema": schema}


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _json_list(functions: list[dict[str, Any]], once: bool) -> Format:
    """[{"name": ..., "parameters": {...}}]; each schema stays a document of its own, so that its
    references hold."""
    tags = [
        _tag(
            f'{{"name": {dumps(function["name"])}, "parameters": ',
            _json(function.get("parameters") or ANY_OBJECT),
            "}",
        )
        for function in functions
    ]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": ", ",
        "at_least_one": True,
        "stop_after_first": once,
    }
    return _sequence(_const("["), calls, _const("]"))


def _harmony(functions: list[dict[str, Any]], forced: bool, answer: Any) -> Format:
    """One call, after reasoning or at once; unless `forced` perhaps an answer, and a preamble."""
    ends: list[Format] = [
        _sequence(
            _const(
                f"{harmony.CHANNEL}commentary to=functions.{function['name']} "
                f"{harmony.CONSTRAIN}json{harmony.MESSAGE}"
            ),
            _json(_followed(function, forced) or ANY_OBJECT),
        )
        for function in functions
    ]
    before = [_or(_harmony_message("analysis"), _const(""))]
    if not forced:
        before.append(_or(_harmony_message("commentary"), _const("")))
        text: Format = {"type": "any_text"} if answer is None else _json(answer)
        ends.append(_sequence(_const(f"{harmony.CHANNEL}final{harmony.MESSAGE}"), text))
    return _sequence(*before, _or(*ends))


def _followed(function: dict[str, Any], forced: bool) -> Any:
    """The schema that the arguments of a call must follow, None if they are free."""
    if not forced and not function.get("strict"):
        return None
    return function.get("parameters") or ANY_OBJECT


def _harmony_message(channel: str) -> Format:
    """A message that another one follows."""
    return _tag(
        f"{harmony.CHANNEL}{channel}{harmony.MESSAGE}",
        {"type": "any_text"},
        f"{harmony.ENDS[0]}{harmony.START}assistant",
    )


def _or(*elements: Format) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


# One call of a tool; `schema` is None where the arguments are free.
Writer = Callable[[str, Any], Format]


def _json_writer(before: str, after: str) -> Writer:
    """`before` has NAME in it."""

    def write(name: str, schema: Any) -> Format:
        return _tag(before.replace("NAME", name), _json(schema or ANY_OBJECT), after)

    return write


def _kimi(name: str, schema: Any) -> Format:
    marks = json_calls.KIMI
    numbered = _sequence(
        {"type": "regex", "pattern": "[0-9]{1,3}"},
        _const(json_calls.KIMI_ARGUMENTS),
        _json(schema or ANY_OBJECT),
    )
    begin = f"{marks.opens}{marks.call}functions.{name}:"
    return _tag(begin, numbered, marks.ends[0] + marks.closes)


def _tag_writer(before: str, after: str, tags: Tags, space: str) -> Writer:
    """`before` ends where the first argument begins; `space` is between tags."""

    def write(name: str, schema: Any) -> Format:
        begin = before.replace("NAME", name)
        if schema is None:
            return _tag(begin, {"type": "any_text"}, tags.end + after)
        line = "\n" if tags.newline else ""

        def argument(key: str, value: Any, root: Any) -> Format:
            head = tags.argument + key + space.join(tags.key_end) + line
            tail = line + tags.value_end + space
            return _tag(head, _text_value(value, root), tail)

        return _tag(begin, _arguments(schema, argument), tags.end + after)

    return write


def _pythonic(name: str, schema: Any) -> Format:
    if schema is None:
        return _tag(f"[{name}(", {"type": "any_text"}, ")]")

    def argument(key: str, value: Any, root: Any) -> Format:
        return _tag(f"{key}=", _json(_with_definitions(value, root)), ", ")

    return _tag(f"[{name}(", _arguments(schema, argument), ")]")


def _gemma_writer(call: str, end: str, quote: str) -> Writer:
    def argument(key: str, value: Any, root: Any) -> Format:
        if _types(value) == ["string"]:
            return _tag(f"{key}:{quote}", _text_value(value, root), f"{quote},")
        return _tag(f"{key}:", _json(_with_definitions(value, root)), ",")

    def write(name: str, schema: Any) -> Format:
        begin = f"{call}call:{name}{{"
        if schema is None:
            return _tag(begin, {"type": "any_text"}, f"}}{end}")
        return _tag(begin, _arguments(schema, argument), f"}}{end}")

    return write


def _arguments(schema: Any, argument: Callable[[str, Any, Any], Format]) -> Format:
    """The properties of a schema one after another; those not required may be missing."""
    properties = schema.get("properties")
    required = schema.get("required")
    elements = []
    for key, value in properties.items() if isinstance(properties, dict) else ():
        one = argument(key, value, schema)
        must = isinstance(required, list) and key in required
        elements.append(one if must else _or(one, _const("")))
    return _sequence(*elements) if elements else _const("")


def _text_value(schema: Any, root: Any) -> Format:
    """A value where strings stand without quotes."""
    if not isinstance(schema, dict):
        return {"type": "any_text"}
    types = _types(schema)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        texts = [value if isinstance(value, str) else dumps(value) for value in values]
        return _or(*map(_const, texts))
    if "string" not in types:
        return _json(_with_definitions(schema, root)) if types else {"type": "any_text"}
    if types == ["string"] and isinstance(pattern := schema.get("pattern"), str):
        inner = re.sub(r"\$$", "", pattern.removeprefix("^"))
        if pattern.startswith("^") and pattern.endswith("$"):
            return {"type": "regex", "pattern": inner}
    return {"type": "any_text"}


def _types(schema: Any) -> list[str]:
    kinds = schema.get("type") if isinstance(schema, dict) else None
    return [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []


def _with_definitions(schema: Any, root: Any) -> Any:
    """Part of a schema with what its references point to."""
    if not isinstance(schema, dict):
        return schema
    return {key: root[key] for key in ("$defs", "definitions") if key in root} | schema


_DEEPSEEK = json_calls.DEEPSEEK
_DEEPSEEK_HEAD = _DEEPSEEK.opens + _DEEPSEEK.call
_STEP3 = tagged_calls.STEP3
_TRIGGERS = {
    "hermes": "<tool_call>",
    "llama3": '{"name": ',
    "mistral": json_calls.MISTRAL.call,
    "deepseekv3": _DEEPSEEK.opens,
    "deepseekv31": _DEEPSEEK.opens,
    "kimi_k2": json_calls.KIMI.opens,
    "qwen3_coder": tagged_calls.QWEN3_CODER.opens,
    "glm45": tagged_calls.GLM45.call,
    "minimax-m2": tagged_calls.MINIMAX.opens,
    "step3": _STEP3.opens,
    "gemma4": python_calls.GEMMA4.call,
    "functiongemma": python_calls.FUNCTION_GEMMA.call,
    "pythonic": "[",
}
_TAGS: dict[str, Writer] = {
    "hermes": _json_writer('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
    "llama3": _json_writer('{"name": "NAME", "parameters": ', "}"),
    "mistral": _json_writer(json_calls.MISTRAL.call + ' [{"name": "NAME", "arguments": ', "}]"),
    "deepseekv3": _json_writer(
        f"{_DEEPSEEK_HEAD}function{json_calls.DEEPSEEK_SEPARATOR}NAME\n```json\n",
        f"\n```{_DEEPSEEK.ends[0]}{_DEEPSEEK.closes}",
    ),
    "deepseekv31": _json_writer(
        f"{_DEEPSEEK_HEAD}NAME{json_calls.DEEPSEEK_SEPARATOR}",
        _DEEPSEEK.ends[0] + _DEEPSEEK.closes,
    ),
    "kimi_k2": _kimi,
    "qwen3_coder": _tag_writer(
        "<tool_call>\n<function=NAME>\n",
        "\n</tool_call>",
        tagged_calls.QWEN3_CODER_TAGS,
        "\n",
    ),
    "glm45": _tag_writer("<tool_call>NAME\n", "", tagged_calls.GLM45_TAGS, "\n"),
    "minimax-m2": _tag_writer(
        '<minimax:tool_call>\n<invoke name="NAME">\n',
        "\n</minimax:tool_call>",
        tagged_calls.MINIMAX_TAGS,
        "\n",
    ),
    "step3": _tag_writer(
        f"{_STEP3.opens}\n{_STEP3.call}function{tagged_calls.STEP3_SEPARATOR}"
        '<steptml:invoke name="NAME">\n',
        f"{_STEP3.ends[0]}\n{_STEP3.closes}",
        tagged_calls.STEP3_TAGS,
        "\n",
    ),
    "gemma4": _gemma_writer("<|tool_call>", "<tool_call|>", python_calls.GEMMA4_QUOTE),
    "functiongemma": _gemma_writer(
        "<start_function_call>", "<end_function_call>", python_calls.FUNCTION_GEMMA_QUOTE
    ),
    "pythonic": _pythonic,
}
