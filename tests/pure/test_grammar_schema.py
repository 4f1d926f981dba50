"""JSON Schema against the official suite and against `jsonschema`: never weaker than asked."""

import json
import random

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.grammar import patterns
from headrace.grammar.compiler import Compiler
from headrace.grammar.refusal import Refused
from headrace.grammar.schema import prepare
from tests.support.grammars import allowed
from tools.json_schema_table import DOCS, DRAFTS, byte_vocabulary, run_suite, table, written

VOCABULARY = byte_vocabulary()
(EOS,) = VOCABULARY.eos


@pytest.fixture(scope="module")
def compiler():
    made = Compiler(lambda: VOCABULARY, {})
    yield made
    made.close()


def matches(compiler: Compiler, schema: object, text: str) -> bool:
    matcher = compiler.compile("json_schema", json.dumps(schema)).result().copy()
    return all(matcher.fits(byte) for byte in text.encode()) and matcher.complete


@pytest.fixture(scope="module")
def outcomes():
    return [one for draft in DRAFTS for one in run_suite(draft)]


def test_no_invalid_instance_is_accepted(outcomes):
    assert len(outcomes) > 700
    assert [one for one in outcomes if one.wrong] == []


def test_every_refusal_names_its_place(outcomes):
    refused = [one for one in outcomes if one.refused]
    assert len(refused) > 100
    assert [one for one in refused if not one.place.startswith("#")] == []


def test_every_valid_instance_can_be_written(outcomes):
    """But for formats, which are narrower, and asserted; docs/structured-output.md lists them."""
    missed = {one.file for one in outcomes if one.missed}
    formats = {"date-time", "email", "ipv6", "time"}
    assert missed == {f"optional/format/{name}" for name in formats} | {
        "format",
        "optional/float-overflow",
    }
    annotations = [one for one in outcomes if one.file == "format"]
    assert all("only an annotation" in name for one in annotations for name in one.missed)


def test_the_table_in_the_docs_is_current(outcomes):
    text = DOCS.read_text(encoding="utf-8")
    assert written(text, table(outcomes)) == text, "run tools/json_schema_table.py"


REFUSED = [
    ({"properties": {"a": {"not": {}}}}, "#/properties/a/not"),
    ({"properties": {"a/b": {"uniqueItems": True}}}, "#/properties/a~1b/uniqueItems"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"minLenght": 3}}}, "#/$defs/x/minLenght"),
    ({"$ref": "other.json"}, "#/$ref"),
    ({"$ref": "#anchor"}, "#/$ref"),
    ({"$ref": "#/$defs/none"}, "#/$ref"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance"),
    ({"type": "string", "format": "made-up"}, "#/format"),
    ({"type": "string", "format": "unknown"}, "#/format"),
    ({"type": "text"}, "#/type"),
    ({"type": "string", "pattern": "(?i)a"}, "#/pattern"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
    ({"anyOf": []}, "#/anyOf"),
    ({"enum": []}, "#/enum"),
    ({"minLength": -1}, "#/minLength"),
    ({"minLength": 1.5}, "#/minLength"),
    ({"contentEncoding": "base64"}, "#/contentEncoding"),
    ({"type": "string", "nullable": True}, "#/nullable"),
    ({"properties": {"a": {}}, "minProperties": 2}, "#/minProperties"),
    ({"properties": {"a": {"const": "x\0"}}}, "#/properties/a/const"),
    ({"properties": {"a": {"pattern": "^\\x01$"}}}, "#/properties/a/pattern"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {}},
      "properties": {"p": {"$ref": "#/definitions/a", "maxLength": 2}}}, "#/properties/p/$ref"),
    ({"properties": {"a": {"$id": "http://x/y"}}}, "#/properties/a/$id"),
    ({"properties": {f"p{i}": {} for i in range(2000)}}, "#/properties"),
    ([1], "#"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "place"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(schema, place):
    with pytest.raises(Refused) as caught:
        prepare(json.dumps(schema))
    assert caught.value.place == place
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"multipleOf": 1.00000000000000001e-30}}}, "#/properties/a"),
        ({"$defs": {"x": {"enum": ["a"], "pattern": "b"}}, "items": {"$ref": "#/$defs/x"},
          "minItems": 1, "type": "array"}, "#/$defs/x"),
    ],
)  # fmt: skip
def test_what_the_engine_refuses_is_found(compiler, schema, place):
    with pytest.raises(Refused) as caught:
        compiler.compile("json_schema", json.dumps(schema)).result()
    assert caught.value.place == place


@pytest.mark.parametrize("text", ["{", '{"maximum": NaN}', '{"maximum": 1e999}', "[" * 5000, "1"])
def test_what_is_no_schema(text):
    with pytest.raises(Refused):
        prepare(text)


def test_one_of_with_a_discriminator(compiler):
    """As pydantic writes tagged unions."""
    schema = {
        "$defs": {
            name: {
                "type": "object",
                "properties": {"kind": {"const": name}, "size": {"type": "integer"}},
                "required": ["kind", "size"],
            }
            for name in ("cat", "dog")
        },
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
    }
    assert matches(compiler, schema, '{"kind":"dog","size":3}')
    assert not matches(compiler, schema, '{"kind":"cow","size":3}')


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (".", "a", "\r"),
        (r"\s", "﻿", "a"),
        (r"\S", "a", "﻿"),
        (r"[^\S]", "﻿", "a"),
        (r"[\s\S]", "\n", "aa"),
        (r"\d", "1", "٣"),
        (r"\w", "_", "é"),
        ("[[a]", "[", "]"),
        ("[a&&b]", "&", "c"),
        (r"[\]x]", "]", "\\"),
        (r"(?:ab)+", "abab", "aab"),
    ],
)
def test_patterns_mean_what_they_mean_in_ecma(compiler, pattern, good, bad):
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    assert matches(compiler, schema, json.dumps(good, ensure_ascii=False))
    assert not matches(compiler, schema, json.dumps(bad, ensure_ascii=False))


@pytest.mark.parametrize(
    "pattern", ["(?i)a", "(?=a)", "(?<=a)b", "[a", "a\\", r"\h", "[]", "a{,2}"]
)
def test_patterns_that_are_refused(compiler, pattern):
    with pytest.raises(Refused):
        compiler.compile("json_schema", json.dumps({"pattern": pattern})).result()


def test_a_listed_name_cannot_be_written_otherwise(compiler):
    """With an escape it would pass for another property, with any value."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": []}
    assert matches(compiler, schema, '{"b":"x"}')
    assert not matches(compiler, schema, '{"\\u0061":"x"}')
    closed = {**schema, "additionalProperties": False, "properties": {"a": {"const": "\0"}}}
    assert matches(compiler, closed, '{"a":"\\u0000"}')


@pytest.mark.parametrize(
    ("low", "high", "good", "bad"),
    [(0, 0.1, "0.05", "0"), (-1.5, -1, "-1.25", "-1"), (-0.5, 0, "-0.1", "-0")],
)
def test_exclusive_bounds_are_exclusive(compiler, low, high, good, bad):
    schema = {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
    assert matches(compiler, schema, good)
    assert not matches(compiler, schema, bad)


def test_white_space_is_bounded(compiler):
    assert matches(compiler, {"type": "array"}, "[\n  1,\n  2\n]")
    assert not matches(compiler, {"type": "array"}, "[  1]")
    assert not matches(compiler, {"type": "array"}, " [1]")


def test_formats_with_a_pattern(compiler):
    schema = {"type": "string", "format": "date", "pattern": "^20"}
    assert matches(compiler, schema, '"2024-02-29"')
    assert not matches(compiler, schema, '"2023-02-29"')
    assert not matches(compiler, schema, '"1999-01-01"')
    assert set(patterns.FORMATS) == {"date", "time", "date-time"}


# -- random schemas, random outputs, an oracle ---------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c d", "é"])
BOUND = st.integers(-20, 20)


def node(children):
    numbers = st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": BOUND,
            "maximum": BOUND.map(lambda n: n + 40),
            "multipleOf": st.sampled_from([1, 2, 5]),
        },
    )
    strings = st.fixed_dictionaries(
        {"type": st.just("string"), "maxLength": st.integers(2, 12)},
        optional={
            "minLength": st.integers(0, 2),
            "pattern": st.sampled_from(["^[a-c]+", "[0-9]$", "x"]),
        },
    )
    formats = st.builds(
        lambda name: {"type": "string", "format": name},
        st.sampled_from(["date", "time", "date-time", "uuid", "ipv4"]),
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": children, "maxItems": st.integers(2, 3)},
        optional={
            "minItems": st.integers(0, 2),
            "prefixItems": st.lists(children, min_size=1, max_size=2),
        },
    )
    objects = st.builds(
        lambda properties, required, more: {
            "type": "object",
            "properties": properties,
            "required": sorted(set(required) & properties.keys()),
            "additionalProperties": more,
        },
        st.dictionaries(NAMES, children, max_size=3),
        st.lists(NAMES, max_size=2),
        st.just(False),
    )
    enums = st.lists(
        st.sampled_from([None, True, 0, 1.5, "x", '"q"', [1], {"k": 2}]), min_size=1, max_size=3
    ).map(lambda values: {"enum": values})
    unions = st.lists(children, min_size=1, max_size=3).map(lambda many: {"anyOf": many})
    both = st.tuples(children, children).map(lambda pair: {"allOf": list(pair)})
    return st.one_of(numbers, strings, formats, arrays, objects, enums, unions, both)


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": [0, 7]}]),
    node,
    max_leaves=6,
)  # fmt: skip


def write_something(matcher, dice: random.Random, most: int = 600) -> str | None:
    """A random walk through what the masks allow; None when it does not come to an end."""
    out = bytearray()
    while len(out) < most:
        ids = allowed(matcher.mask(), VOCABULARY.size).tolist()
        if EOS in ids and (len(ids) == 1 or dice.random() < 0.7):
            return out.decode()
        # Ends are preferred, so that walks stay short.
        ids = [byte for byte in ids if byte != EOS]
        closing = [byte for byte in ids if byte in b'"}]' and dice.random() < 0.5]
        token = dice.choice(closing or ids)
        matcher.accept(token)
        out.append(token)
    return None


def test_random_schemas(compiler):
    assert random_outputs(compiler) > 60


def random_outputs(compiler: Compiler) -> int:
    """How many random outputs of random schemas came to an end; the oracle finds each valid."""
    ended = 0

    @given(schema=SCHEMAS, seed=st.integers(0, 2**32))
    @settings(
        max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    def check(schema, seed):
        nonlocal ended
        try:
            matcher = compiler.compile("json_schema", json.dumps(schema)).result()
        except Refused:
            return
        text = write_something(matcher.copy(), random.Random(seed))
        if text is None:
            return
        ended += 1
        jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(text))

    check()
    return ended
