"""Output parsers: every dialect, every way to cut its text, and whatever else a model may write."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.parsers import (
    JSON_CALLS,
    REASONING,
    TOOL_DIALECTS,
    make_parser,
    markers,
    prompt_opens,
)
from headrace.text.parsers.events import Arguments, Content, Event, Reasoning, ToolCall
from headrace.text.parsers.json_text import JsonScanner, loads
from tests.support.transcripts import TOOLS, TRANSCRIPTS, Transcript

IDS = [transcript.name for transcript in TRANSCRIPTS]


def joined(events: list[Event]) -> list[tuple[str, str]]:
    """(kind, text) with neighbors of one kind joined; also checks how calls are numbered."""
    found: list[tuple[str, str]] = []
    calls = 0
    for event in events:
        if isinstance(event, ToolCall):
            assert event.index == calls
            calls += 1
            found.append(("call", f"{event.name} {event.id} "))
            continue
        kind = {Content: "content", Reasoning: "reasoning", Arguments: "call"}[type(event)]
        assert event.text, "an event says something"
        if isinstance(event, Arguments):
            assert event.index == calls - 1 and found[-1][0] == "call"
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + event.text)
        else:
            found.append((kind, event.text))
    return found


def parse(transcript: Transcript, *pieces: str) -> list[tuple[str, str]]:
    parser = make_parser(
        transcript.reasoning, transcript.tools, TOOLS, thinking=True, opened=transcript.opened
    )
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=IDS)
def test_whole_text(transcript):
    assert parse(transcript, transcript.text) == transcript.events


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=IDS)
def test_every_cut_gives_the_same(transcript):
    text = transcript.text
    assert parse(transcript, *text) == transcript.events, "one character at a time"
    for cut in range(1, len(text)):
        assert parse(transcript, text[:cut], text[cut:]) == transcript.events, text[:cut]


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=IDS)
def test_two_cuts_give_the_same(transcript):
    text = transcript.text
    pairs = [(i, j) for i in range(1, len(text)) for j in range(i + 1, len(text))]
    for i, j in random.Random(1).sample(pairs, min(100, len(pairs))):
        assert parse(transcript, text[:i], text[i:j], text[j:]) == transcript.events, (i, j)


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=IDS)
def test_cut_off_text_starts_the_same(transcript):
    """What was said of a part of the text stays true of all of it, and arguments begin JSON."""
    for end in range(len(transcript.text)):
        parser = make_parser(
            transcript.reasoning, transcript.tools, TOOLS, thinking=True, opened=transcript.opened
        )
        events = parser.feed(transcript.text[:end])
        before = joined(events)
        for found, whole in zip(before, transcript.events, strict=False):
            assert found[0] == whole[0] and whole[1].startswith(found[1])
        assert len(before) <= len(transcript.events)
        for kind, text in joined(events + parser.finish()):
            if kind == "call":
                assert begins_json(text.split(" ", 2)[2])


def begins_json(text: str) -> bool:
    scanner = JsonScanner()
    scanner.advance(text, 0)
    return not scanner.failed


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=IDS)
def test_little_is_held_back(transcript):
    """Plain text that starts no marker comes out as it goes in."""
    parser = make_parser(
        transcript.reasoning, transcript.tools, TOOLS, thinking=True, opened=transcript.opened
    )
    parser.feed("Well,")
    for word in (" this", " is", " a", " text", "."):
        out = "".join(event.text for event in parser.feed(word))
        assert out == word


@pytest.mark.parametrize("tools", sorted(set(TOOL_DIALECTS.values())))
def test_arguments_stream(tools):
    """Long text arguments come in many pieces, other arguments one by one."""
    transcript = next(one for one in TRANSCRIPTS if TOOL_DIALECTS.get(one.tools) == tools)
    parser = make_parser(transcript.reasoning, tools, TOOLS, thinking=True, opened=None)
    fed = [parser.feed(char) for char in transcript.text]
    pieces = [events for events in fed if any(isinstance(e, Arguments) for e in events)]
    assert len(pieces) >= (2 if tools == "pythonic" else 5)


ALL = sorted({*TOOL_DIALECTS, JSON_CALLS})
MARKS = sorted({mark for name in ALL for mark in markers("", name)})
MARKS += sorted({mark for name in REASONING for mark in markers(name, "")})
BITS = [
    *MARKS, '{"name": "now", "arguments": {', '"a": 1', '"a": "', "}", "}}", "]", "now", "(", ")",
    "functions.now:0", " to=functions.now", "analysis", "get_weather", "call:now{", "city", "=",
    "```json", "\n", " ", "\\", '"', "'", ":", ",", "1e5", "nul", "\ud83d\ude42".encode(
        "utf-16", "surrogatepass").decode("utf-16"), "\\ud800", "[now(city=", "x" * 20, "[", "{",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(BITS) | st.text(max_size=4), max_size=24).map("".join)


@given(st.sampled_from(ALL), st.sampled_from(["", *sorted(REASONING)]), TEXTS, st.data())
@settings(max_examples=60, deadline=None)
def test_any_text_in_any_pieces(tools, reasoning, text, data):
    transcript = Transcript("", reasoning, tools, text, [])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(transcript, text)
    assert parse(transcript, *pieces) == whole
    for kind, found in whole:
        found.encode()
        if kind == "call":
            assert begins_json(found.split(" ", 2)[2])


@given(st.text(alphabet="abc .,\n<>[]{}|/", max_size=60), st.sampled_from(ALL))
@settings(max_examples=60, deadline=None)
def test_text_without_marks_is_content(text, tools):
    assert "".join(found for _, found in parse(Transcript("", "", tools, text, []), text)) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False,
       allow_infinity=False) | st.text(), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12), st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_scanner_accepts_json(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1)
    scanner = JsonScanner()
    at, out = 0, ""
    for end in range(len(text) + 1):
        at, piece = scanner.advance(text[:end], at)
        out += piece
    scanner.end()
    assert scanner.done and not scanner.failed
    assert out == text


@pytest.mark.parametrize(
    "text",
    ["{,}", '{"a"}', '{"a":}', "[1,]", "[01]", "[1.]", "[1e]", "[-]", "[tru]", '["\\x"]',
     '["\\u12g4"]', "[1 2]", '{"a":1,}', "{1:2}", "[NaN]", "]", "[1}", "['a']", "[+1]", "[.5]"],
)  # fmt: skip
def test_scanner_refuses_what_is_not_json(text):
    with pytest.raises(ValueError):
        loads(text)
    scanner = JsonScanner()
    scanner.advance(text, 0)
    assert scanner.failed


def test_without_thinking_all_is_content():
    parser = make_parser("deepseek-r1", "", [], thinking=False)
    assert joined(parser.feed("a</think>b") + parser.finish()) == [("content", "a</think>b")]


def test_without_tools_markup_is_content():
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parser = make_parser("", "hermes", [], thinking=True)
    assert joined(parser.feed(text) + parser.finish()) == [("content", text)]


def test_channels_without_their_parser_are_content():
    text = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
    parser = make_parser("", "gpt-oss", TOOLS, thinking=True)
    assert joined(parser.feed(text) + parser.finish()) == [("content", "ab")]


def test_end_of_a_prompt_says_whether_reasoning_is_open():
    assert prompt_opens("qwen3", "<|im_start|>assistant\n<think>\n") is True
    assert prompt_opens("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert prompt_opens("qwen3", "<|im_start|>assistant\n") is None
    assert prompt_opens("gpt-oss", "<|start|>assistant") is None
    assert prompt_opens("", "<think>") is None


def test_long_text_takes_linear_time():
    """Texts that invite looking back: each would take minutes if something were read again."""
    for tools, text in [
        ("hermes", "\n" * 50_000),
        ("hermes", '<tool_call>{"x":' * 5_000),
        ("hermes", '<tool_call>{"x":"' * 5_000),
        ("hermes", "<tool_cal" * 5_000),
        ("hermes", '<tool_call>{"name": "now", "arguments": ' + '{"a":[' * 10_000),
        ("qwen3_coder", "<tool_call>\n" * 5_000),
        ("pythonic", "[now(a=" + "[" * 20_000),
        ("gpt-oss", "<|channel|>" * 5_000),
        ("gemma4", "<|tool_call>call:now{a:" + "{a:" * 10_000),
    ]:
        parser = make_parser("qwen3", tools, TOOLS, thinking=True)
        for at in range(0, len(text), 50):
            parser.feed(text[at : at + 50])
        parser.finish()
