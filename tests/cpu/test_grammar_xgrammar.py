"""The optional engine: the same promises as the default one, and refusals where it would be lax."""

import json
import random
import re
import sys
import time

import pytest

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.engine.parts import grammar_backend
from headrace.grammar.compiler import Compiler
from headrace.grammar.engine import XGRAMMAR, Broken
from headrace.grammar.gate import GrammarGate
from headrace.grammar.refusal import Refused
from headrace.grammar.vocabulary import build_vocabulary
from tests.pure import test_grammar_ebnf as ebnf
from tests.pure.test_grammar_scheduler import Client, expected, make_scheduler, spec
from tests.pure.test_grammar_schema import matches, random_outputs, write_something
from tests.support.grammars import EOS, VOCAB, allowed, small_vocabulary, text_of
from tools.json_schema_table import DOCS, DRAFTS, byte_vocabulary, run_suite, table, written


@pytest.fixture(scope="module")
def compiler():
    made = Compiler(byte_vocabulary, {}, XGRAMMAR)
    yield made
    made.close()


@pytest.fixture(scope="module")
def small():
    made = Compiler(small_vocabulary, {}, XGRAMMAR)
    yield made
    made.close()


def refusal(field: str, text: str, specials=()) -> Refused:
    with pytest.raises(Refused) as caught:
        XGRAMMAR.translate(field, text, dict(specials))
    assert caught.value.status == 400
    return caught.value


# -- JSON schema ---------------------------------------------------------------------------------


def test_the_official_suite():
    """No invalid instance is accepted, every refusal names its place, the table is current."""
    outcomes = [one for draft in DRAFTS for one in run_suite(draft, XGRAMMAR)]
    assert len(outcomes) > 700
    assert [one for one in outcomes if one.wrong] == []
    assert [one for one in outcomes if one.refused and not one.place.startswith("#")] == []
    assert sum(one.accepted for one in outcomes) > 600
    text = DOCS.read_text(encoding="utf-8")
    assert written(text, table(outcomes), XGRAMMAR) == text, "run tools/json_schema_table.py"


def test_random_schemas(compiler):
    assert random_outputs(compiler) > 30


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, "#/allOf"),
        ({"type": "string", "anyOf": [{"minLength": 2}, {"maxLength": 4}]}, "#/type"),
        ({"properties": {"a/b": {"$ref": "#/$defs/x", "maxLength": 2}}, "$defs": {"x": {}}},
         "#/properties/a~1b/maxLength"),
        ({"properties": {"a": {}}, "required": ["b"]}, "#/required"),
        ({"properties": {"a": {}}, "additionalProperties": True}, "#/additionalProperties"),
        ({"properties": {"a": {}}, "patternProperties": {"b": {}}}, "#/patternProperties"),
        ({"type": "number", "multipleOf": 0.5}, "#/multipleOf"),
        ({"type": "integer", "multipleOf": 3, "minimum": 4}, "#/multipleOf"),
        ({"type": "number", "minimum": 0, "maximum": 1e-9}, "#/minimum"),
        ({"type": "string", "format": "email"}, "#/format"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "#/pattern"),
        ({"type": "string", "pattern": r"\bword"}, "#/pattern"),
        ({"type": "string", "pattern": '^"$'}, "#/pattern"),
        ({"type": "string", "maxLength": 5000}, "#/maxLength"),
        ({"items": {"not": {}}}, "#/items/not"),
        ({"properties": {"a": False}}, "#/properties/a"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_would_ignore_is_refused(schema, place):
    found = refusal("json_schema", json.dumps(schema))
    assert found.place == place


def test_what_pydantic_writes(compiler):
    schema = {
        "$defs": {"Part": {"type": "object", "title": "Part", "required": ["kind"],
                           "properties": {"kind": {"const": "part"}, "n": {"type": "integer"}}}},
        "type": "object",
        "properties": {
            "size": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/Part"}, "maxItems": 2},
            "either": {"oneOf": [{"$ref": "#/$defs/Part"}, {"type": "string"}]},
        },
        "required": ["size"],
    }  # fmt: skip
    good = '{"size": 0.5, "parts": [{"kind": "part", "n": 3}], "either": "x"}'
    assert matches(compiler, schema, good)
    assert matches(compiler, schema, '{"size":null}')
    for bad in ('{"size": 0}', '{"parts": []}', '{"size": 1, "either": {}}', '{"size": 1, "x": 1}'):
        assert not matches(compiler, schema, bad)


# -- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("grammar", "good", "bad"), ebnf.GRAMMARS, ids=range(len(ebnf.GRAMMARS)))
def test_ebnf(compiler, grammar, good, bad):
    assert [text for text in good if not ebnf.matches(compiler, "ebnf", grammar, text)] == []
    assert [text for text in bad if ebnf.matches(compiler, "ebnf", grammar, text)] == []


def test_recursion_is_exact(compiler):
    """Where the default engine takes the longest match of each expression."""
    grammar = 'root ::= [a-c]+ root "." | "c"'
    assert ebnf.matches(compiler, "ebnf", grammar, "abccc..")
    assert not ebnf.matches(compiler, "ebnf", grammar, "abccc.....")


PATTERNS = [
    r"(mill|wheel)-[0-9]{2,4}", r"\d+(\.\d+)?", r"[^a\s]{3}b*?", r"\w+@\w+\.(com|org)", "a|b|",
    r"[\d\-x]{2,}\u00e9?", r"(?:ab?){2,3}\$", r"\S\W\D", "^(yes|no)$", ".{2}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regex(compiler, pattern):
    compiled = compiler.compile("regex", pattern).result()
    ended = 0
    for seed in range(12):
        text = write_something(compiled.copy(), random.Random(seed), most=200)
        if text is not None:
            ended += 1
            assert re.fullmatch(pattern, text), text
    assert ended > 3


@pytest.mark.parametrize(
    "pattern", ["(?i)a", "(?=a)b", r"a\b", r"\p{L}", "a{3,2}", "(a{1,1000}){1,1000}", "[a&&b]", "("]
)
def test_regexes_that_are_refused(pattern):
    assert refusal("regex", pattern).message.startswith("regex: ")


@pytest.mark.parametrize(("tag", "good", "bad"), ebnf.TAGS, ids=range(len(ebnf.TAGS)))
def test_structural_tags(tag, good, bad):
    """Where the default engine's tests name no special token, it does the same."""
    tags = Compiler(lambda: ebnf.VOCABULARY, ebnf.SPECIALS, XGRAMMAR)
    text = tag if isinstance(tag, str) else json.dumps(tag)
    if "<|call|>" in text:
        assert "special token" in refusal("structural_tag", text, ebnf.SPECIALS.items()).message
    else:
        assert [t for t in good if not ebnf.matches(tags, "structural_tag", text, t)] == []
        assert [t for t in bad if ebnf.matches(tags, "structural_tag", text, t)] == []
    tags.close()


def test_refusals_inside_tags_name_their_place():
    tag = {"begin": "<a>", "content": {"type": "json_schema", "json_schema": {
        "type": "string", "format": "uri"}}, "end": "</a>"}  # fmt: skip
    text = {"type": "structural_tag", "format": {"type": "tag", **tag}}
    found = refusal("structural_tag", json.dumps(text))
    assert found.place == "#/format/content/json_schema/format"
    text["format"]["content"] = {"type": "regex", "pattern": r"\b"}
    assert refusal("structural_tag", json.dumps(text)).place == "#/format/content/pattern"


# -- matchers ------------------------------------------------------------------------------------


def test_drafts_are_rolled_back(small):
    matcher = small.compile("regex", "abcabc").result().copy()
    vocabulary = small.vocabulary
    a, b, c = (vocabulary.tokens.index(text) for text in (b"a", b"b", b"c"))
    masks = [matcher.mask()]
    for token in (a, b, c):
        assert matcher.fits(token)
        masks.append(matcher.mask())
    assert not matcher.fits(c)
    matcher.rollback(2)
    assert matcher.mask() == masks[1]
    for token, mask in zip((b, c), masks[2:], strict=True):
        matcher.accept(token)
        assert matcher.mask() == mask
    with pytest.raises(Broken):
        matcher.accept(c)
    matcher.accept(a)
    matcher.write("b")
    assert not matcher.complete and not matcher.ended
    matcher.accept(c)
    assert matcher.complete and matcher.ended
    assert allowed(matcher.mask(), VOCAB).tolist() == [EOS]
    matcher.accept(EOS)
    assert matcher.ended and allowed(matcher.mask(), VOCAB).tolist() == [EOS]
    matcher.rollback(1)
    assert matcher.complete and matcher.ended


GRAMMARS = [
    {"regex": "[abc]{3,9}"},
    {"json_schema": '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'},
    {"ebnf": 'root ::= "[" root "]" | [a-c]+'},
    {"structural_tag": '{"type":"structural_tag","format":{"type":"sequence","elements":['
     '{"type":"regex","pattern":"[abc]*-"},{"type":"json_schema","json_schema":{"const":1}}]}}'},
]  # fmt: skip


@pytest.mark.parametrize("overlap", [True, False])
def test_in_the_scheduler(small, overlap):
    """Together, with retraction, as each alone; a bad one fails alone."""
    options = {"disable_overlap_schedule": not overlap}
    scheduler = make_scheduler(GrammarGate(small), pages=14, **options)
    requests = [spec(f"r{i}", grammar) for i, grammar in enumerate(GRAMMARS)]
    for request in [*requests, spec("bad", {"regex": "("}), spec("free", {})]:
        scheduler.submit(request)
    client = Client(scheduler).run()
    assert client.finish["bad"].status == 400
    for request in requests:
        assert client.out[request.rid] == expected(small, request)


def test_reasoning_and_no_end_of_sequence():
    vocabulary = small_vocabulary(eos=())
    made = Compiler(lambda: vocabulary, {}, XGRAMMAR)
    scheduler = make_scheduler(GrammarGate(made), pages=64)
    scheduler.submit(spec("end", {"regex": "a12"}))
    scheduler.submit(
        spec("think", {"regex": "[abc]{5}"}, reasoning_end='":', sampling={"max_new_tokens": 200})
    )
    client = Client(scheduler).run()
    made.close()
    assert client.finish["end"].type == "stop"
    assert text_of(vocabulary, client.out["end"]) == "a12"
    _, found, answer = text_of(vocabulary, client.out["think"]).partition('":')
    assert found and client.finish["think"].type == "stop" and set(answer) <= set("abc")


def test_what_takes_long_is_refused_or_quick():
    words = [bytes([i]) for i in range(256)] + [f"w{i}".encode() for i in range(3000)]
    made = Compiler(lambda: build_vocabulary([*words, b""], {3256: b"<eos>"}, [3256]), {}, XGRAMMAR)
    made.compile("regex", "a").result()
    texts = {
        "enum": {"enum": [f"value-{i * 7919}" for i in range(20_000)]},
        "names": {"properties": {f"p{i}": {} for i in range(1000)}},
        "counted": {"properties": {f"p{i}": {} for i in range(100)}, "minProperties": 9},
        "long": {"type": "string", "maxLength": 1000},
        "many": {"type": "array", "maxItems": 1000, "items": {"type": "string", "maxLength": 99}},
    }
    for text in texts.values():
        began = time.monotonic()
        made.compile("json_schema", json.dumps(text)).exception()
        assert time.monotonic() - began < 60
    made.close()


def test_it_is_named_when_it_is_missing(monkeypatch):
    config = Config.from_flat({"grammar_backend": "xgrammar"})
    assert grammar_backend(config) is XGRAMMAR
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"pip install 'headrace\[xgrammar\]'"):
        grammar_backend(config)
