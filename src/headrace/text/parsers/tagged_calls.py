"""Dialects that write every argument between tags: Qwen3-Coder, GLM 4.5, MiniMax M2, Step 3.

An argument is plain text; the schema of the tool says what JSON it is. Text of type string is
passed on as it comes, other types once they are complete. The formats are those of the published
chat templates.
"""

import json
import re
from dataclasses import dataclass

from headrace.text.parsers.calls import Body, Markers, Reader
from headrace.text.parsers.json_text import dumps
from headrace.text.parsers.schema import to_json
from headrace.text.parsers.source import Mismatch, Wait

_KEY = re.compile(r"[^<>\"\s]")
MAX_KEY = 256

STEP3_SEPARATOR = "<\uff5ctool_sep\uff5c>"

QWEN3_CODER = Markers(call="<function=", opens="<tool_call>", closes="</tool_call>")
GLM45 = Markers(call="<tool_call>")
MINIMAX = Markers(call='<invoke name="', opens="<minimax:tool_call>", closes="</minimax:tool_call>")
STEP3 = Markers(
    call="<\uff5ctool_call_begin\uff5c>",
    ends=("<\uff5ctool_call_end\uff5c>",),
    opens="<\uff5ctool_calls_begin\uff5c>",
    closes="<\uff5ctool_calls_end\uff5c>",
    inside=(STEP3_SEPARATOR,),
    special=True,
)


@dataclass(frozen=True)
class Tags:
    """`name` name_end (`argument` key `key_end` value `value_end`)* `end`; `key_end` may be two
    tags with white space between. `newline`: a value stands on lines of its own."""

    argument: str
    key_end: tuple[str, ...]
    value_end: str
    end: str
    name_end: str = ""
    newline: bool = False


QWEN3_CODER_TAGS = Tags("<parameter=", (">",), "</parameter>", "</function>", ">", newline=True)
GLM45_TAGS = Tags("<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>", "</tool_call>")
MINIMAX_TAGS = Tags('<parameter name="', ('">',), "</parameter>", "</invoke>", '">')
STEP3_TAGS = Tags(
    '<steptml:parameter name="', ('">',), "</steptml:parameter>", "</steptml:invoke>", '">'
)


def tagged(tags: Tags) -> Body:
    """The body of a call written so."""

    def body(reader: Reader) -> Wait[None]:
        yield from tagged_call(reader, tags)

    return body


def step3(reader: Reader) -> Wait[None]:
    """function SEP, then a tagged call."""
    source = reader.source
    yield from reader.name()
    yield from source.expect((STEP3_SEPARATOR,))
    yield from source.spaces()
    yield from source.expect(('<steptml:invoke name="',))
    yield from tagged_call(reader, STEP3_TAGS)


def tagged_call(reader: Reader, tags: Tags) -> Wait[None]:
    """One call, from its name to its end tag.

    Raises:
        Mismatch: it is no call, or wrong from here on.
    """
    source = reader.source
    yield from source.spaces()
    name = yield from reader.name()
    if tags.name_end:
        yield from source.expect((tags.name_end,))
    yield from source.spaces()
    tag = yield from source.expect((tags.argument, tags.end))
    reader.begin(name)
    reader.write("{")
    first = True
    while tag == tags.argument:
        yield from _argument(reader, tags, name, "" if first else ", ")
        first = False
        yield from source.spaces()
        tag = yield from source.expect((tags.argument, tags.end))
    reader.write("}")


def _argument(reader: Reader, tags: Tags, name: str, before: str) -> Wait[None]:
    source = reader.source
    key = yield from source.run(_KEY, MAX_KEY)
    for tag in tags.key_end:
        yield from source.expect((tag,))
        if tag != tags.key_end[-1]:
            yield from source.spaces()
    if tags.newline:
        yield from source.matches("\n")
    layout, most = ("\n", 1) if tags.newline else ("", 0)
    types = reader.tools.types(name, key)
    if types == {"string"}:
        reader.write(f'{before}{dumps(key)}: "')

        def write(text: str) -> None:
            reader.out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        if not (yield from source.until((tags.value_end,), write, layout, most)):
            raise Mismatch
        yield from source.expect((tags.value_end,))
        reader.write('"')
        return
    value, found = yield from source.held_until((tags.value_end,))
    if not found:
        raise Mismatch
    yield from source.expect((tags.value_end,))
    if tags.newline:
        value = value.removesuffix("\n")
    reader.write(f"{before}{dumps(key)}: {to_json(value, types)}")
