"""The count of a body's values against what the json module makes of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import BadRequest
from headrace.server import census
from headrace.server.census import check_values, count_values

texts = st.text(st.sampled_from('"\\{}[],:a\n\u20ac'), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=30,
)


def counted(value: Any) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + sum(map(counted, value))
    if isinstance(value, dict):
        return 1 + sum(1 + counted(inner) for inner in value.values())
    return 0


@given(values, st.integers(1, 40), st.booleans())
def test_the_count_is_that_of_json(value, block, ascii_only):
    before, census._BLOCK = census._BLOCK, block
    try:
        raw = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert count_values(raw) == counted(value)
    finally:
        census._BLOCK = before


@given(st.binary(max_size=200))
def test_anything_may_come(raw):
    assert count_values(raw) <= len(raw)


def test_what_is_large_is_refused_by_name():
    body = {"text": "{" * 9000, "stop": ["x"] * 998}
    check_values(json.dumps(body).encode(), 1003)
    with pytest.raises(BadRequest, match=r"has 1003 strings.*most of them in stop.*have 1002") as e:
        check_values(json.dumps(body).encode(), 1002)
    assert e.value.field == "stop"


@pytest.mark.parametrize("raw", [b"[" * 5000, b'["a"' + b',"a"' * 5000, b'{"a":' * 5000])
def test_what_is_no_object_has_no_field(raw):
    with pytest.raises(BadRequest, match="strings, lists and objects; it may") as e:
        check_values(raw, 1000)
    assert e.value.field is None


def test_numbers_are_free():
    check_values(json.dumps({"input_ids": list(range(10_000))}).encode(), 3)
