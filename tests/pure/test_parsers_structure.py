"""Structural tags: whatever follows one is read as a call by the parser of the same dialect."""

import itertools
import json
import random
import re
from contextlib import closing
from typing import Any

import pytest

from headrace.grammar.compiler import Compiler
from headrace.grammar.vocabulary import build_vocabulary
from headrace.text.parsers import (
    TOOL_DIALECTS,
    dialect_of_calls,
    enforces,
    make_parser,
    reasoning_end,
    structure,
)
from headrace.text.parsers.events import Arguments, Content, ToolCall
from headrace.text.parsers.harmony import MARKERS
from tests.support.transcripts import TOOLS

DIALECTS = sorted(set(TOOL_DIALECTS.values()))
NAMED = {"type": "function", "function": {"name": "get_weather"}}
STRICT = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "kind": {"type": "string", "enum": ["a", "b c"]},
                "code": {"type": "string", "pattern": "^[0-9]{1,3}$"},
                "at": {"$ref": "#/$defs/point"},
            },
            "required": ["kind", "code", "at"],
            "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}}},
        },
    },
}
JSON = {
    "string": '"a \\"b\\""', "integer": "7", "number": "1.5", "boolean": "true", "null": "null",
    "array": '["x"]', "object": '{"k": [1, {"s": "t"}]}',
}  # fmt: skip


class Sampler:
    """Texts that a format allows; strings are free text where the format says so."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def text(self, node: dict[str, Any]) -> str:
        kind = node["type"]
        if kind == "tags_with_separator" and not node["stop_after_first"]:
            picked = [self.dice.choice(node["tags"]) for _ in range(2)]
            return node["separator"].join(map(self.text, picked))
        if kind in ("triggered_tags", "tags_with_separator", "or"):
            return self.text(self.dice.choice(node.get("tags") or node["elements"]))
        if kind == "sequence":
            return "".join(map(self.text, node["elements"]))
        if kind == "tag":
            return node["begin"] + self.text(node["content"]) + node["end"]
        if kind == "json_schema":
            return self.value(node["json_schema"], node["json_schema"])
        if kind == "regex":
            assert node["pattern"] == "[0-9]{1,3}"
            return "12"
        return node["value"] if kind == "const_string" else 'free "text"'

    def value(self, schema: dict[str, Any], root: dict[str, Any]) -> str:
        if "$ref" in schema:
            return self.value(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
        if "enum" in schema:
            return json.dumps(self.dice.choice(schema["enum"]))
        if branches := schema.get("anyOf"):
            return self.value(self.dice.choice(branches), root)
        if properties := schema.get("properties"):
            pairs = (f"{json.dumps(k)}: {self.value(v, root)}" for k, v in properties.items())
            return "{" + ", ".join(pairs) + "}"
        return JSON[schema["type"]]


def check(schema: dict[str, Any], arguments: dict[str, Any]) -> None:
    properties = schema.get("properties", {})
    assert arguments.keys() <= properties.keys() or not properties
    assert set(schema.get("required", [])) <= arguments.keys()
    for key, value in arguments.items():
        kind = properties.get(key, {}).get("type")
        if kind in ("string", "integer", "boolean", "array"):
            wanted = {"string": str, "integer": int, "boolean": bool, "array": list}[kind]
            assert type(value) is wanted, (key, value)


@pytest.mark.parametrize("dialect", ["", *DIALECTS])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_what_follows_the_tag_is_a_call(dialect, choice):
    tools = [*TOOLS, STRICT]
    tag = structure(dialect, tools, choice)
    assert tag is not None and tag["type"] == "structural_tag"
    json.dumps(tag)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    seen = set()
    for seed in range(60):
        text = Sampler(seed).text(tag["format"])
        parser = make_parser("", dialect_of_calls(dialect, choice), tools, thinking=True)
        events = list(itertools.chain(*map(parser.feed, text))) + parser.finish()
        calls = [event for event in events if isinstance(event, ToolCall)]
        assert calls, text
        for call in calls:
            pieces = (e.text for e in events if isinstance(e, Arguments) and e.index == call.index)
            check(schemas[call.name], json.loads("".join(pieces)))
            seen.add(call.name)
        if dialect != "gpt-oss":  # reasoning before the call is content without its parser
            assert not any(isinstance(event, Content) for event in events), text
    assert seen == ({"get_weather"} if isinstance(choice, dict) else set(schemas))


def test_flags_of_the_tag():
    forced = structure("hermes", TOOLS, "required")["format"]
    assert (forced["at_least_one"], forced["stop_after_first"]) == (True, False)
    one = structure("hermes", TOOLS, "required", parallel=False)["format"]
    assert (one["at_least_one"], one["stop_after_first"]) == (True, True)
    named = structure("hermes", TOOLS, NAMED)["format"]
    assert (named["at_least_one"], named["stop_after_first"]) == (True, True)
    assert len(named["tags"]) == 1
    assert named["tags"][0]["begin"] == '<tool_call>\n{"name": "get_weather", "arguments": '
    assert named["tags"][0]["content"]["json_schema"] == TOOLS[0]["function"]["parameters"]


def test_free_choice_is_constrained_only_for_strict_tools_or_one_call():
    assert structure("hermes", TOOLS, "auto") is None
    assert structure("hermes", TOOLS, "none") is None
    assert structure("hermes", [], "auto", parallel=False) is None
    free = structure("qwen3_coder", [*TOOLS, STRICT], "auto")["format"]
    assert (free["at_least_one"], free["stop_after_first"]) == (False, False)
    kinds = [tag["content"]["type"] for tag in free["tags"]]
    assert kinds == ["any_text", "any_text", "sequence"]
    assert structure("hermes", TOOLS, "auto", parallel=False)["format"]["stop_after_first"]
    assert structure("gpt-oss", TOOLS, "auto") is None
    assert enforces("gpt-oss", "auto")
    assert structure("", [STRICT], "auto") is None and not enforces("", "auto")


CHANNEL, CONTINUE = "<|channel|>", "<|end|><|start|>assistant"
PICK = f"{CHANNEL}commentary to=functions.pick <|constrain|>json<|message|>"
RIGHT, WRONG = '{"kind":"a","code":"12","at":{}}', '{"kind":"z","code":"12","at":{}}'
SAID = (
    f"{CHANNEL}final<|message|>Hello, I am to=functions.pick",
    f"{CHANNEL}analysis<|message|>Hm.{CONTINUE}{CHANNEL}final<|message|>Hi",
    f"{CHANNEL}analysis<|message|>Hm.{CONTINUE}{PICK}{RIGHT}",
    f"{CHANNEL}commentary<|message|>I pick.{CONTINUE}{PICK}{RIGHT}",
    f'{CHANNEL}commentary to=functions.now <|constrain|>json<|message|>{{"any": 1}}',
)
UNSAID = (f"{PICK}{WRONG}", f"{CHANNEL}analysis<|message|>Hm.{CONTINUE}{PICK}{WRONG}")


@pytest.fixture(scope="module")
def harmony_words():
    """The bytes and the marks of gpt-oss; (words, vocabulary)."""
    marks = [mark.encode() for mark in MARKERS]
    plain = [bytes([byte]) for byte in range(256)]
    vocabulary = build_vocabulary(
        plain + [b""] * len(marks), dict(enumerate(marks, 256)), (256 + marks.index(b"<|call|>"),)
    )
    return re.compile(b"|".join(map(re.escape, marks)) + b"|(?s:.)"), marks, vocabulary


def test_strict_tools_of_gpt_oss(harmony_words):
    """An answer, a preamble and other tools stay free; the strict tool follows its schema."""
    word, marks, vocabulary = harmony_words
    tag = structure("gpt-oss", [*TOOLS, STRICT], "auto")
    names = {mark: 256 + number for number, mark in enumerate(MARKERS)}
    with closing(Compiler(lambda: vocabulary, names)) as compiler:
        grammar = compiler.compile("structural_tag", json.dumps(tag)).result()

    def follows(text: str) -> bool:
        matcher = grammar.copy()
        words = word.findall(text.encode())
        ids = [256 + marks.index(one) if one in marks else one[0] for one in words]
        return all(matcher.fits(id) for id in ids) and matcher.complete

    assert [follows(text) for text in SAID] == [True] * len(SAID)
    assert [follows(text) for text in UNSAID] == [False] * len(UNSAID)


def test_an_answer_has_its_own_schema():
    answer, calls = structure("hermes", TOOLS, "auto", answer={"type": "object"})["format"][
        "elements"
    ]
    assert answer == {"type": "json_schema", "json_schema": {"type": "object"}}
    assert calls["at_least_one"]
    forced = structure("hermes", TOOLS, "required", answer={"type": "object"})["format"]
    assert forced["type"] == "triggered_tags"


def test_without_a_dialect_calls_are_a_json_list():
    opening, calls, closing = structure("", TOOLS, NAMED)["format"]["elements"]
    assert (opening["value"], closing["value"]) == ("[", "]")
    assert calls["stop_after_first"] and calls["at_least_one"]
    assert calls["tags"][0]["begin"] == '{"name": "get_weather", "parameters": '
    several = structure("", TOOLS, "required")["format"]["elements"][1]
    assert len(several["tags"]) == 2 and not several["stop_after_first"]


def test_where_a_grammar_begins():
    assert reasoning_end("qwen3", None) == "</think>"
    assert reasoning_end("qwen3", False) == ""
    assert reasoning_end("deepseek-v3", None) == ""
    assert reasoning_end("deepseek-v3", True) == "</think>"
    assert reasoning_end("gpt-oss", None) == ""
    assert reasoning_end("", None) == ""
