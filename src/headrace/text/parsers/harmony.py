"""gpt-oss's format: messages on channels, each with a header.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

The channel `analysis` is reasoning; `final` and `commentary` are content; a message to a function
is a call. The prompt ends with `<|start|>assistant`, so a text begins with a channel. Text without
a header is content.
"""

import re
from collections.abc import Callable
from contextlib import suppress

from headrace.text.parsers.calls import Grammar, Reader
from headrace.text.parsers.json_text import pass_json
from headrace.text.parsers.schema import Tools
from headrace.text.parsers.source import Mismatch, Out, Source, Wait

# The name of the dialect and of the reasoning family.
HARMONY = "gpt-oss"
START, CHANNEL, CONSTRAIN = "<|start|>", "<|channel|>", "<|constrain|>"
MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
MAX_HEADER = 512
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([\w.:/-]+)")


def harmony(tools: Tools | None, *, reasoning: bool) -> Grammar:
    """Without `tools`, or with `reasoning` off, those messages are content like others."""

    def grammar(source: Source, out: Out) -> Wait[None]:
        reader = Reader(source, out, tools or Tools([]))
        while True:
            if not (yield from source.until((START, CHANNEL), out.content)):
                return
            with suppress(Mismatch):
                header = yield from _header(source)
                name = _function(header, reader.tools) if tools is not None else ""
                if name:
                    yield from _call(reader, name)
                else:
                    thought = reasoning and _channel(header) == "analysis"
                    yield from _message(source, out.reasoning if thought else out.content)
            out.content(source.recall())

    return grammar


def _header(source: Source) -> Wait[str]:
    """Take a header with its end mark.

    Raises:
        Mismatch: the text ends in it, it is too long, or another message begins.
    """
    text = ""
    while len(text) <= MAX_HEADER:
        marker = yield from source.match(MARKERS)
        text += marker
        if marker == MESSAGE:
            return text
        if marker in ENDS:
            break
        if not marker:
            if not (yield from source.more()):
                break
            text += source.take(source.at + 1)
    raise Mismatch


def _channel(header: str) -> str:
    match = _CHANNEL.search(header)
    return match[1] if match else ""


def _function(header: str, tools: Tools) -> str:
    """The function that the message is for; built-in tools of the model are none of ours."""
    match = _RECIPIENT.search(header)
    if match is None:
        return ""
    name = match[1].removeprefix("functions.")
    return name if name in tools or match[1].startswith("functions.") else ""


def _call(reader: Reader, name: str) -> Wait[None]:
    source = reader.source
    yield from source.spaces()
    if (yield from source.match(ENDS)) or not (yield from source.more()):
        reader.begin(name)
        reader.write("{}")
        return
    if (yield from source.peek()) != "{":
        raise Mismatch
    reader.begin(name)
    yield from pass_json(source, reader.out.arguments)
    yield from source.spaces()
    if (yield from source.match(ENDS)) or not (yield from source.more()):
        source.drop()


def _message(source: Source, sink: Callable[[str], None]) -> Wait[None]:
    """Pass the text of a message on, up to its end or the next header."""
    source.drop()
    if (yield from source.until((*ENDS, START, CHANNEL), sink)) in ENDS:
        yield from source.match(ENDS)
        source.drop()
