"""Dialects with a notation of their own for values: Llama 4 (Python) and Gemma.

Llama 4 and some others write a Python list of calls, `[get(city="Paris", days=3)]`; an argument is
passed on when it is complete. Gemma writes `call:get{city:<|"|>Paris<|"|>,days:3}` between markers;
strings in it are passed on as they come. Values are read as data, nothing is evaluated.
"""

import ast
import json
import re
from typing import Any

from headrace.text.parsers.calls import Body, Markers, Reader
from headrace.text.parsers.json_text import dumps, loads, take_json
from headrace.text.parsers.source import Mismatch, Source, Wait

LLAMA4_TAG = "<|python_start|>"
LLAMA4_END = "<|python_end|>"
GEMMA4_QUOTE = '<|"|>'
GEMMA4 = Markers("<|tool_call>", ("<tool_call|>",), inside=(GEMMA4_QUOTE,), special=True)
FUNCTION_GEMMA_QUOTE = "<escape>"
FUNCTION_GEMMA = Markers(
    "<start_function_call>",
    ("<end_function_call>",),
    inside=(FUNCTION_GEMMA_QUOTE,),
    special=True,
)
MAX_DEPTH = 64

_IDENTIFIER = re.compile(r"\w")
_GEMMA_KEY = re.compile(r"[^\s:{}\[\],<>]")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None}


def pythonic(reader: Reader) -> Wait[None]:
    """A list of calls of given tools."""
    source = reader.source
    yield from source.spaces()
    yield from source.expect(("[",))
    while True:
        yield from source.spaces()
        name = yield from reader.name()
        if name not in reader.tools:
            raise Mismatch
        yield from source.expect(("(",))
        yield from _python_arguments(reader, name)
        yield from source.spaces()
        if not (yield from source.matches(",")):
            break
    yield from source.expect(("]",))
    source.drop()
    yield from source.spaces()
    if (yield from source.matches(LLAMA4_END)):
        source.drop()
        yield from source.spaces()
    if not (yield from source.more()):
        source.drop_layout()


def _python_arguments(reader: Reader, name: str) -> Wait[None]:
    """From after the opening parenthesis to the closing one."""
    source = reader.source
    before = "{"
    while True:
        yield from source.spaces()
        if (yield from source.matches(")")):
            break
        key = yield from source.run(_IDENTIFIER, 256)
        yield from source.spaces()
        if not key or not (yield from source.matches("=")):
            raise Mismatch
        value = _python_json((yield from _python_text(source)))
        if before == "{":
            reader.begin(name)
        reader.write(f"{before}{dumps(key)}: {value}")
        before = ", "
        yield from source.matches(",")
    if before == "{":
        reader.begin(name)
        reader.write("{")
    reader.write("}")


def _python_text(source: Source) -> Wait[str]:
    """Take one expression: up to a comma or a closing bracket that is not its own."""
    text, quote, depth = "", "", 0
    while char := (yield from source.peek()):
        if not quote and depth == 0 and char in ",)":
            return text
        text += source.take(source.at + 1)
        if quote:
            if char == "\\" and (yield from source.more()):
                text += source.take(source.at + 1)
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
    raise Mismatch


def _python_json(text: str) -> str:
    """JSON of a Python literal; JSON's own words count too."""
    for attempt in (text.strip(), text.strip().replace("\n", "\\n")):
        try:
            return dumps(_plain(ast.parse(attempt, mode="eval").body))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise Mismatch


def _plain(node: ast.expr) -> Any:
    """The value of a literal; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_plain(key) if key else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_plain, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _plain(node.operand)
        if isinstance(value, int | float):
            return -value
    raise ValueError("not a literal")


def gemma(quote: str) -> Body:
    """The body of a Gemma call; strings stand between `quote`."""

    def body(reader: Reader) -> Wait[None]:
        source = reader.source
        yield from source.spaces()
        yield from source.expect(("call:",))
        name = yield from reader.name()
        yield from source.spaces()
        yield from source.expect(("{",))
        reader.begin(name)
        yield from _GemmaValue(reader, quote).object(0)

    return body


class _GemmaValue:
    """Gemma's notation of values to JSON."""

    def __init__(self, reader: Reader, quote: str) -> None:
        self._reader = reader
        self._source = reader.source
        self._quote = quote

    def object(self, depth: int) -> Wait[None]:
        """From after the opening brace."""
        source, write = self._source, self._reader.write
        write("{")
        before = ""
        yield from source.spaces()
        while not (yield from source.matches("}")):
            key = yield from self._key()
            yield from source.spaces()
            yield from source.expect((":",))
            write(f"{before}{dumps(key)}: ")
            yield from self.value(depth + 1)
            yield from source.spaces()
            if not (yield from source.matches(",")) and (yield from source.peek()) != "}":
                raise Mismatch
            yield from source.spaces()
            before = ", "
        write("}")

    def array(self, depth: int) -> Wait[None]:
        """From after the opening bracket."""
        source, write = self._source, self._reader.write
        write("[")
        before = ""
        yield from source.spaces()
        while not (yield from source.matches("]")):
            write(before)
            yield from self.value(depth + 1)
            yield from source.spaces()
            if not (yield from source.matches(",")) and (yield from source.peek()) != "]":
                raise Mismatch
            yield from source.spaces()
            before = ", "
        write("]")

    def value(self, depth: int) -> Wait[None]:
        source, write = self._source, self._reader.write
        yield from source.spaces()
        mark = yield from source.match((self._quote, "{", "["))
        if depth > MAX_DEPTH:
            raise Mismatch
        if mark == "{":
            yield from self.object(depth)
        elif mark == "[":
            yield from self.array(depth)
        elif mark:
            write('"')
            yield from self._string()
            write('"')
        elif (yield from source.peek()) == '"':
            write((yield from take_json(source)))
        else:
            text, found = yield from source.held_until((",", "}", "]"))
            if not found or not text.strip():
                raise Mismatch
            write(_scalar(text.strip()))

    def _key(self) -> Wait[str]:
        source = self._source
        if (yield from source.matches(self._quote)):
            text, _ = yield from source.held_until((self._quote,))
            yield from source.expect((self._quote,))
            return text
        if (yield from source.peek()) == '"':
            return str(loads((yield from take_json(source))))
        key = yield from source.run(_GEMMA_KEY, 256)
        if not key:
            raise Mismatch
        return key

    def _string(self) -> Wait[None]:
        def write(text: str) -> None:
            self._reader.out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        yield from self._source.until((self._quote,), write)
        yield from self._source.expect((self._quote,))


def _scalar(text: str) -> str:
    """A number, true, false or null as it is; any other word is a string."""
    try:
        value = loads(text)
        dumps(value)
    except ValueError:
        return dumps(text)
    return text if not isinstance(value, str | list | dict) else dumps(text)
