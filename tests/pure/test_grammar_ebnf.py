"""EBNF and structural tags: what is accepted, what is refused and where."""

import json

import pytest

from headrace.grammar.compiler import Compiler
from headrace.grammar.refusal import Refused
from headrace.grammar.source import MAX_BYTES, translate
from headrace.grammar.vocabulary import build_vocabulary

SPECIALS = {"<|call|>": 257, "<eos>": 256}
VOCABULARY = build_vocabulary(
    [*(bytes([i]) for i in range(256)), b"", b""], {256: b"<eos>", 257: b"<|call|>"}, [256]
)


@pytest.fixture(scope="module")
def compiler():
    made = Compiler(lambda: VOCABULARY, SPECIALS)
    yield made
    made.close()


def matches(compiler: Compiler, field: str, grammar: str, text: str) -> bool:
    """`text` as bytes, with special tokens where it names them."""
    matcher = compiler.compile(field, grammar).result().copy()
    tokens: list[int] = []
    for index, part in enumerate(text.split("<|call|>")):
        tokens += [257] * (index > 0) + list(part.encode())
    return all(matcher.fits(token) for token in tokens) and matcher.complete


JSON = r"""
# JSON, as in many collections of grammars
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""

GRAMMARS = [
    (JSON, ['{"a": [1, -2.5e3, "x\\n"], "b": {}}', "{}"], ['{"a": }', "[1]", '{"a" 1}']),
    ('root ::= "(" root ")" | [a-z]', ["a", "((b))"], ["((b)", "ab"]),
    ('root ::= city\n  | "a " city\ncity ::= "Paris" | "Rome"', ["Rome", "a Paris"], ["a "]),
    ('root ::= [a-z]* "foo"', ["foo", "abfoo", "foofoo"], ["abfo", "fooa"]),
    ("root ::= [^a-c\\]]{2,3}", ["xy", "[[["], ["a", "x", "xxxx", "]]"]),
    (r'root ::= "\x41\u00e9\U0001F600\t" [\-x-z^]', ["Aé😀\t-", "Aé😀\t^", "Aé😀\ty"], ["Aé😀\tw"]),
    ('root ::= ("a" "b"?)+ # end', ["a", "abab", "aab"], ["", "b", "abb"]),
    ("root ::= .{2}", ["a\n", "éé"], ["a"]),
    ('root ::= a-b\na-b ::= a_b\na_b ::= "x"', ["x"], ["y"]),
    ('root ::= "" | "a"{2}', ["", "aa"], ["a"]),
    ('root ::= "a/b" [/]', ["a/b/"], ["a/b"]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), GRAMMARS, ids=range(len(GRAMMARS)))
def test_ebnf(compiler, grammar, good, bad):
    assert [text for text in good if not matches(compiler, "ebnf", grammar, text)] == []
    assert [text for text in bad if matches(compiler, "ebnf", grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "place", "why"),
    [
        ('start ::= "a"', "", "root"),
        ('root ::= "a"\n\nroot ::= "b"', "line 3", "twice"),
        ('root ::= "a" b', "line 1", "not defined"),
        ('root ::= "a', "line 1", "cannot read"),
        ('root ::= "\\q"', "line 1", "escape"),
        ("root ::= [z-a]", "line 1", "empty"),
        ("root ::= []", "line 1", "empty"),
        ('root ::= "a"{3,2}', "line 1", "empty"),
        ('root ::= ("a"', "line 1", "does not end"),
        ("root ::= *", "line 1", "repeat"),
        ('root ::= "a" (= "b")', "line 1", "cannot read"),
        ('root ::= TagDispatch(("a", b))\nb ::= "c"', "line 1", "cannot read"),
        ('\nroot = "a"', "line 2", "cannot read"),
        ("root ::= [\\uD800]", "line 1", "not a character"),
        ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "line 1", "nested"),
    ],
)
def test_ebnf_refusals(grammar, place, why):
    with pytest.raises(Refused) as caught:
        translate("ebnf", grammar, {})
    assert why in caught.value.message
    assert caught.value.place == place


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "a" root', "root ::= a\na ::= b\nb ::= a", 'root ::= ("x" | root){2} root'],
)
def test_grammars_without_end(grammar):
    with pytest.raises(Refused, match="never ends"):
        translate("ebnf", grammar, {})


def test_what_nothing_satisfies(compiler):
    with pytest.raises(Refused, match="satisf"):
        compiler.compile("json_schema", '{"$ref":"#"}').result()


def test_limits():
    for field, most in MAX_BYTES.items():
        with pytest.raises(Refused, match="limit"):
            translate(field, "a" * (most + 1), {})
    with pytest.raises(Refused, match="empty"):
        translate("regex", "", {})


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("a/b\\/c", "a/b/c", "ab"),
        ("^(yes|no)$", "no", "on"),
        ("a\nb", "a\nb", "a b"),
        ("(?i)ok", "OK", "KO"),
    ],
)
def test_regex(compiler, pattern, good, bad):
    assert matches(compiler, "regex", pattern, good)
    assert not matches(compiler, "regex", pattern, bad)


OLD = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"enum": ["x"]}, "end": "</f>"},
        {"begin": "<|call|>go", "schema": {"type": "null"}, "end": "<|call|>"},
    ],
    "triggers": ["<f", "<|call|>"],
}
TAG = {
    "type": "tag",
    "begin": "<t>",
    "content": {"type": "regex", "pattern": "[0-9]+"},
    "end": "</t>",
}
ANY = {"type": "tag", "begin": "<x>", "content": {"type": "any_text"}, "end": "</x>"}


def tree(kind: str, **fields) -> dict:
    return {"type": "structural_tag", "format": {"type": kind, **fields}}


TAGS = [
    (OLD, ["", "plain < text", "a<f=a>1</f> b <f=b>\"x\"</f>.", "<|call|>gonull<|call|>"],
     ["<f", "<f=a>x</f>", "<f=c>", "<|call|>stop", "<f=a>1"]),
    (tree("const_string", value="a<|call|>"), ["a<|call|>"], ["a", "a\\<|call|>"]),
    (tree("sequence", elements=[{"type": "const_string", "value": "n="}, {"type": "json_schema",
     "json_schema": {"type": "integer"}}, {"type": "any_text"}]), ["n=1", "n=12 and"], ["n=", "1"]),
    (tree("or", elements=[TAG, {"type": "grammar", "grammar": 'root ::= "g" root?'}]),
     ["<t>12</t>", "ggg"], ["<t></t>", "h"]),
    (tree("triggered_tags", triggers=["<"], tags=[TAG, ANY]),
     ["", "hi <t>1</t>x<x>a<y</x>"], ["<", "<t>a</t>", "<x>a"]),
    (tree("triggered_tags", triggers=["<"], tags=[TAG], at_least_one=True),
     ["<t>1</t>", "<t>1</t> and <t>2</t>."], ["", "a <t>1</t>"]),
    (tree("triggered_tags", triggers=["<"], tags=[TAG], stop_after_first=True),
     ["abc", "a <t>1</t>"], ["<t>1</t>b"]),
    (tree("triggered_tags", triggers=["<"], tags=[TAG], stop_after_first=True, at_least_one=True),
     ["<t>1</t>"], ["", "a <t>1</t>", "<t>1</t><t>1</t>"]),
    (tree("tags_with_separator", tags=[TAG], separator=", "),
     ["", "<t>1</t>", "<t>1</t>, <t>2</t>"], ["<t>1</t>,<t>2</t>", "<t>1</t>, "]),
    (tree("tags_with_separator", tags=[TAG, ANY], separator="", at_least_one=True),
     ["<x></x>", "<t>1</t><x>a</x>"], ["", "a"]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "good", "bad"), TAGS, ids=range(len(TAGS)))
def test_structural_tags(compiler, value, good, bad):
    grammar = json.dumps(value)
    assert [text for text in good if not matches(compiler, "structural_tag", grammar, text)] == []
    assert [text for text in bad if matches(compiler, "structural_tag", grammar, text)] == []


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({}, ""),
        ({"structures": [], "triggers": ["a"]}, "#/structures"),
        (OLD | {"triggers": ["x"]}, "#/tags/0/begin"),
        (tree("qwen_xml_parameter", json_schema={}), "#/format/type"),
        (tree("const_string"), "#/format/value"),
        (tree("const_string", value="a", more=1), "#/format/more"),
        (tree("json_schema", json_schema={"not": {}}), "#/format/json_schema/not"),
        (tree("json_schema", json_schema={"items": {"if": {}}}), "#/format/json_schema/items/if"),
        (tree("sequence", elements=[{"type": "any_text"}, TAG]), "#/format/elements/0"),
        (tree("triggered_tags", triggers=["<"], tags=[TAG], excludes=["a"]), "#/format/excludes"),
        (tree("triggered_tags", triggers=[], tags=[TAG]), "#/format/triggers"),
        (tree("triggered_tags", triggers=["<"], tags=[{"begin": 3}]), "#/format/tags/0/begin"),
        (tree("triggered_tags", triggers=["a<|call|>"], tags=[TAG | {"begin": "a<|call|>"}]),
         "#/format/triggers"),
    ],
)  # fmt: skip
def test_structural_tag_refusals(value, place):
    with pytest.raises(Refused) as caught:
        translate("structural_tag", json.dumps(value), SPECIALS)
    assert caught.value.place == place


def test_special_tokens_never_match_text(compiler):
    matcher = compiler.compile("regex", "(?s:.)+").result().copy()
    assert not matcher.fits(257)
    assert all(matcher.fits(byte) for byte in b"<|call|>")
