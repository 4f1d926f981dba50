"""Stop strings and stop patterns over a stream of text.

A stop is found at the first character after which the text contains it: this does not depend on
how the stream was cut. Of stops found at the same character, the one that starts first counts,
then strings before patterns, in the order given. The text before it is the output. Does not
know token budgets or EOS.

Invariant: no part of a stop that is found was emitted before, and what is held back is never
longer than the longest suffix that could still become a stop (for a pattern that looks around
itself: that could one character ago). The exception, because `regex` reports no partial match
there: a lazy repeat just before a look-behind (`.*?(?<=a)`) may be found late or missed.
"""

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import regex

from headrace.core.errors import BadRequest
from headrace.text.detokenize import IncrementalDecoder
from headrace.text.tokenizer import Tokenizer

MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_PATTERNS = 32
MAX_PATTERN_BYTES = 256
# `regex` unrolls counted repeats: the memory and time of compiling grow with length times repeats.
MAX_PATTERN_SIZE = 10_000
# CPU seconds the patterns of a request may take for one push, and again for every 64 characters.
PATTERN_BUDGET_S = 0.02
# Constructs whose match can depend on the text after it: $, \Z, \b, \B, look-aheads, atomic and
# possessive groups. A false alarm costs time only.
_LOOKS_AHEAD = re.compile(r"\$|\\[ZbB]|\(\?<?[=!>]|[*+?}]\+")


def validate_stops(stops: Sequence[str], patterns: Sequence[str] = ()) -> None:
    """Raise `BadRequest` with the field and the limit unless a `StopFilter` can take these."""
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} strings; the limit is {MAX_STOPS}", field="stop")
    for i, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise BadRequest(
                f"stop[{i}] has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARS}",
                field="stop",
            )
    if len(patterns) > MAX_PATTERNS:
        raise BadRequest(
            f"stop_regex has {len(patterns)} patterns; the limit is {MAX_PATTERNS}",
            field="stop_regex",
        )
    for i, pattern in enumerate(patterns):
        if problem := _pattern_problem(pattern):
            raise BadRequest(f"stop_regex[{i}] {problem}", field="stop_regex")


class StopFilter:
    """Passes text on until one of `stops` or `patterns` is complete, and nothing after it.

    `matched` is the stop string or the pattern source that was found. `keep` emits the stop too.
    Patterns have the syntax and meaning of Python's `re.search` over the text so far.
    """

    def __init__(
        self, stops: Sequence[str], patterns: Sequence[str] = (), keep: bool = False
    ) -> None:
        self.matched: str | None = None
        self._keep = keep
        self._scans: list[_StringScan | _PatternScan] = [_PatternScan(p) for p in patterns]
        if stops:
            self._scans.insert(0, _StringScan(stops))
        # Kept for look-behinds; no accepted pattern can look back further.
        self._context = MAX_PATTERN_SIZE if patterns else 0
        self._text = ""  # emitted context, then what is held back
        self._emitted = 0

    def push(self, text: str) -> str:
        """What may be emitted after `text` arrived.

        Raises `BadRequest` (field stop_regex) when a pattern takes too long; the filter is then
        dead.
        """
        if self.matched is not None:
            return ""
        if not self._scans:
            return text
        seen = len(self._text)
        self._text += text
        deadline = self._deadline(len(text)) if self._context else 0.0
        hits = [hit for scan in self._scans if (hit := scan.scan(self._text, seen, deadline))]
        if not hits:
            return self._emit(min([scan.start for scan in self._scans]))
        hit = min(hits, key=lambda hit: (hit.seen_at, hit.start))
        self.matched = hit.source
        return self._emit(hit.end if self._keep else hit.start)

    def finish(self) -> str:
        """The text still held back: the stream ended, so it became no stop."""
        return "" if self.matched is not None else self._emit(len(self._text))

    def _deadline(self, size: int) -> float:
        return time.thread_time() + PATTERN_BUDGET_S * (1 + size // 64)

    def _emit(self, end: int) -> str:
        """Emit up to `end` and forget context that nothing looks back to."""
        out = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if self._emitted > 2 * self._context:
            cut = self._emitted - self._context
            self._text = self._text[cut:]
            self._emitted = self._context
            for scan in self._scans:
                scan.forget(cut)
        return out


class StopMatcher:
    """Tells the scheduler, token by token, when a stop is complete.

    Agrees with a `StopFilter` over the text of the same tokens. A stop string that is exactly a
    special token also matches when `skip_special_tokens` keeps that token out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        stops: Sequence[str],
        patterns: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer, prompt_tail, skip_special_tokens=skip_special_tokens
        )
        self._filter = StopFilter(stops, patterns)
        self._special = {tokenizer.special_id(s): s for s in stops} if skip_special_tokens else {}

    def push(self, token_id: int) -> str | None:
        """The stop that this token completes (or an earlier one did)."""
        self._filter.push(self._decoder.push((token_id,)))
        if self._filter.matched is None:
            self._filter.matched = self._special.get(token_id)
        return self._filter.matched


class _Hit(NamedTuple):
    """A stop at text[start:end], seen at `seen_at` (after `end` if the pattern looks ahead)."""

    seen_at: int
    start: int
    end: int
    source: str


class _StringScan:
    """Looks for the stop strings; `start` is where the text's longest beginning of one starts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.start = 0
        self._automaton = _automaton(tuple(stops))
        self._state = 0

    def forget(self, count: int) -> None:
        """The first `count` characters of the text are gone."""
        self.start -= count

    def scan(self, text: str, seen: int, deadline: float) -> _Hit | None:
        """The first stop that ends after `seen`."""
        automaton, state = self._automaton, self._state
        if state == 0 and automaton.next[0].keys().isdisjoint(text[seen:]):
            self.start = len(text)
            return None
        for end in range(seen + 1, len(text) + 1):
            state = automaton.step(state, text[end - 1])
            if stop := automaton.longest[state]:
                return _Hit(end, end - len(stop), end, stop)
        self._state = state
        self.start = len(text) - automaton.depth[state]
        return None


class _PatternScan:
    """Looks for one pattern; `start` is where the earliest match that more text could complete
    is."""

    def __init__(self, source: str) -> None:
        self.start = 0
        self._alive = 0  # the same for the text as it is now; `start` may be one character behind
        self._source = source
        self._pattern = _compile(source)
        # A match in a text is a match in every longer text, unless the pattern can look at the end.
        # Nor is a failure at the end final then: `a\B` fails on "a" and matches in "ab".
        self._lasting = _LOOKS_AHEAD.search(source) is None

    def forget(self, count: int) -> None:
        """The first `count` characters of the text are gone."""
        self.start -= count
        self._alive -= count

    def scan(self, text: str, seen: int, deadline: float) -> _Hit | None:
        """The match in the shortest text[:n] with n > `seen` that has one."""
        if self._lasting and self._match(text, len(text), deadline) is None:
            return None
        for end in range(seen + 1, len(text) + 1):
            if match := self._match(text, end, deadline):
                return _Hit(end, match.start(), match.end(), self._source)
        return None

    def _match(self, text: str, end: int, deadline: float) -> "regex.Match[str] | None":
        """A match in text[:end]; without one, moves `start` to the earliest partial match."""
        left = deadline - time.thread_time()
        try:
            if left <= 0:
                raise TimeoutError
            match = self._pattern.search(text, self.start, end, partial=True, timeout=left)
        except TimeoutError:
            raise BadRequest(
                f"stop_regex {self._source!r} took more than {PATTERN_BUDGET_S * 1000:.0f} ms",
                field="stop_regex",
            ) from None
        if match is not None and not match.partial:
            return match
        partial = end if match is None else match.start()
        self.start = partial if self._lasting else min(partial, self._alive)
        self._alive = partial
        return None


class _Automaton:
    """Aho-Corasick over the stop strings (Aho and Corasick, 1975).

    A state is the longest suffix of the stream that starts some stop; `depth` is its length and
    `longest` the longest stop that ends there ("" if none does).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.longest = [""]
        self._fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        while char not in self.next[state]:
            if state == 0:
                return 0
            state = self._fail[state]
        return self.next[state][char]

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.next[state]:
                self.next[state][char] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.longest.append("")
                self._fail.append(0)
            state = self.next[state][char]
        self.longest[state] = stop

    def _link(self) -> None:
        """Fail links breadth first: the longest proper suffix of a state that is a state too."""
        queue = list(self.next[0].values())
        for state in queue:
            for char, child in self.next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                self.longest[child] = self.longest[child] or self.longest[self._fail[child]]
                queue.append(child)


@lru_cache(maxsize=256)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)


def _compile(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern, regex.VERSION0)


def _pattern_problem(pattern: str) -> str | None:
    """Why a stop pattern is refused. Compiled with `re` first: its syntax is the contract, and
    `regex` adds recursion, reverse search and more that partial matching cannot serve."""
    size = len(pattern.encode("utf-8", "surrogatepass"))
    if not 0 < size <= MAX_PATTERN_BYTES:
        return f"has {size} bytes; it must have 1 to {MAX_PATTERN_BYTES}"
    for count in re.findall(r"\{(\d+)", pattern):
        size *= max(int(count), 1)
    if size > MAX_PATTERN_SIZE:
        return f"is {size} bytes with its repeats written out; the limit is {MAX_PATTERN_SIZE}"
    try:
        matches_nothing = re.compile(pattern).search("") is not None
        _compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression: {error}"
    return "matches the empty string, so nothing could be generated" if matches_nothing else None
