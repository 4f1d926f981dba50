"""Stop strings and patterns in a stream, against an offline search of the whole text."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.core.errors import BadRequest
from headrace.text.detokenize import IncrementalDecoder
from headrace.text.stop import StopFilter, StopMatcher, validate_stops
from headrace.text.tokenizer import Tokenizer
from tests.support.tokenizers import backend

TOKENIZER = Tokenizer(backend("byte_level"))
LETTERS = "ab<é🙂"
PATTERNS = [
    "a+b",
    "ab|ba",
    "a{2,}",
    "^b",
    "b$",
    "(?m)^a",
    "(?<=b)a",
    "a(?=b)",
    "a(?!b)",
    r"\ba",
    r"(a|b)\1",
    "b[^a]*<",
    "(?s)a.b",
    "(?i)AB",
    "é|🙂",
    "(?:ab)+?<",
    "b*a",
    "<.*>",
    "(?>a+)(?<=^aa)",
    "[ab]++<",
    r"<\b",
    r"a\B",
    r"[^a]\b|\Ba",
    r"\\Ba",
]
texts = st.text(LETTERS + ">\n ", max_size=24)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)
pattern_lists = st.lists(st.sampled_from(PATTERNS), max_size=3)


def offline(text: str, stops: list[str], patterns: list[str]) -> tuple[int, int, str] | None:
    """(start, end, source) of the stop, by looking at every prefix of the text with `re`."""
    for end in range(1, len(text) + 1):
        found = [(end - len(s), end, s) for s in stops if text[:end].endswith(s)]
        for pattern in patterns:
            if match := re.search(pattern, text[:end]):
                found.append((match.start(), match.end(), pattern))
        if found:
            return min(found, key=lambda hit: hit[0])
    return None


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(bounds)]


@given(texts, stop_lists, pattern_lists, st.lists(st.integers(0, 99)), st.booleans())
@example("ab", ["ab", "b"], [], [1], False)
@example("aab", [], ["a+b", "b"], [], True)
def test_stream_equals_offline_search(text, stops, patterns, cuts, keep) -> None:
    stop_filter = StopFilter(stops, patterns, keep)
    out = "".join(stop_filter.push(piece) for piece in split(text, cuts)) + stop_filter.finish()
    hit = offline(text, stops, patterns)
    if hit is None:
        assert (out, stop_filter.matched) == (text, None)
    else:
        start, end, source = hit
        assert (out, stop_filter.matched) == (text[: end if keep else start], source)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_held_text_is_the_longest_beginning_of_a_stop(text: str, stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    out = ""
    for n, char in enumerate(text, start=1):
        out += stop_filter.push(char)
        if stop_filter.matched is not None:
            break
        beginnings = {stop[:k] for stop in stops for k in range(len(stop))} | {""}
        longest = max(k for k in range(n + 1) if text[n - k : n] in beginnings)
        assert out == text[: n - longest]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=12), st.data())
def test_matcher_agrees_with_filter_over_tokens(ids: list[int], data) -> None:
    text = TOKENIZER.decode(ids)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 6))
    stops = [text[a : a + n] for a, n in data.draw(st.lists(spans, max_size=3)) if text[a : a + n]]
    patterns = data.draw(pattern_lists)
    decoder, stop_filter = IncrementalDecoder(TOKENIZER, []), StopFilter(stops, patterns)
    matcher = StopMatcher(TOKENIZER, [], stops, patterns)
    for token_id in ids:
        stop_filter.push(decoder.push([token_id]))
        assert matcher.push(token_id) == stop_filter.matched


def test_nothing_is_emitted_after_a_match() -> None:
    stop_filter = StopFilter(["END"])
    assert stop_filter.push("onEtwoEN") == "onEtwo"
    assert stop_filter.push("D three") == ""
    assert stop_filter.push("four") == ""
    assert stop_filter.finish() == ""
    assert stop_filter.matched == "END"


def test_unfinished_beginning_is_flushed() -> None:
    stop_filter = StopFilter(["</s>"])
    assert stop_filter.push("a </") == "a "
    assert stop_filter.finish() == "</"


def test_patterns_hold_back_only_what_may_still_match() -> None:
    stop_filter = StopFilter([], [r"\n\nHuman:"])
    assert stop_filter.push("one\ntwo\n") == "one\ntwo"
    assert stop_filter.push("\nHum") == ""
    assert stop_filter.push("id ") == "\n\nHumid "
    assert stop_filter.push("\n\nHuman: hi") == ""
    assert stop_filter.matched == r"\n\nHuman:"


def test_context_of_a_look_behind_survives_a_long_stream() -> None:
    stop_filter = StopFilter([], ["(?<=a{20})b", "^x", r"\Ay"])
    out = "".join(stop_filter.push("c" * 999 + "x y") for _ in range(50))
    assert out == ("c" * 999 + "x y") * 49 + "c" * 999 + "x "  # a look-behind holds one character
    assert stop_filter.push("a" * 20 + "bb") == "y" + "a" * 20
    assert stop_filter.matched == "(?<=a{20})b"


def test_special_token_as_stop_string_matches_though_it_is_not_text() -> None:
    im_end = TOKENIZER.special_id("<|im_end|>")
    ids = TOKENIZER.encode("Hello world", add_special_tokens=False)
    matcher = StopMatcher(TOKENIZER, [], ["<|im_end|>"])
    assert [matcher.push(i) for i in ids] == [None] * len(ids)
    assert matcher.push(im_end) == "<|im_end|>"
    shown = StopMatcher(TOKENIZER, [], ["<|im_end|>"], skip_special_tokens=False)
    assert shown.push(im_end) == "<|im_end|>"


def test_slow_pattern_is_the_requests_own_error() -> None:
    validate_stops([], ["(x+x+)+y"])
    stop_filter = StopFilter([], ["(x+x+)+y"])
    start = time.perf_counter()
    with pytest.raises(BadRequest, match="20 ms") as caught:
        for _ in range(100):
            stop_filter.push("x" * 10)
    assert caught.value.field == "stop_regex"
    assert time.perf_counter() - start < 30  # without a limit: for ever


def test_filter_takes_linear_time() -> None:
    stop_filter = StopFilter(["a" * 1000 + "b"])
    assert len("".join(stop_filter.push("a" * 10) for _ in range(20_000))) == 199_000


@pytest.mark.parametrize(
    ("stops", "patterns", "field", "limit"),
    [
        (["x"] * 33, [], "stop", "32"),
        (["ok", ""], [], "stop", r"stop\[1\].*1 to 1024"),
        (["x" * 1025], [], "stop", "1024"),
        ([], ["x"] * 33, "stop_regex", "32"),
        ([], ["é" * 129], "stop_regex", "258 bytes.*256"),
        ([], [""], "stop_regex", "1 to 256"),
        ([], ["("], "stop_regex", r"stop_regex\[0\] is not a regular expression"),
        ([], ["a*"], "stop_regex", "empty string"),
        ([], ["(?R)"], "stop_regex", "not a regular expression"),
        ([], ["(?r)ab"], "stop_regex", "not a regular expression"),
        ([], [r"\L<words>"], "stop_regex", "not a regular expression"),
        ([], ["(?:a{1000}){1000}"], "stop_regex", "10000"),
        ([], ["a{99999999999999}"], "stop_regex", "10000"),
    ],
)
def test_limits_are_named(stops, patterns, field: str, limit: str) -> None:
    with pytest.raises(BadRequest, match=limit) as caught:
        validate_stops(stops, patterns)
    assert caught.value.field == field


def test_usual_stops_are_accepted() -> None:
    validate_stops(
        ["\n", "</s>", "🙂"] * 10, [r"\d{3}-\d{4}", "(?i)user:", r"\{\"end\": .{1,50}\}"]
    )
