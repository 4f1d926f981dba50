"""Compiles grammars in threads and keeps the compiled ones.

A grammar is known by its field and text, byte by byte. The engine's limits bound memory and the
time of a step; a compilation that takes too long fails the requests that wait for it, at their
deadline, and goes on alone. Its threads yield to the model's. Knows no requests.
"""

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from headrace.grammar import schema
from headrace.grammar.matcher import Broken, Matcher, first_line
from headrace.grammar.refusal import Refused, step
from headrace.grammar.source import translate
from headrace.grammar.vocabulary import Vocabulary

KEPT = 256
_THREADS = 2
_NICE = 10
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# Time to find the place in a schema that the engine refuses.
_SEARCH_SECONDS = 0.5


class Compiler:
    """Owns the threads, the cache and the vocabulary."""

    def __init__(
        self, read: Callable[[], Vocabulary], specials: Mapping[str, int], kept: int = KEPT
    ) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "grammar", initializer=_yield_to_others)
        self._vocabulary = self._threads.submit(read)
        self._specials = specials
        self._kept = kept
        self._compiled: OrderedDict[tuple[str, str], Future[Matcher]] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """Waits until it is read."""
        return self._vocabulary.result()

    def compile(self, field: str, text: str) -> "Future[Matcher]":
        """A matcher at the beginning of the grammar, to be copied; or a `Refused`."""
        key = (field, text)
        found = self._compiled.get(key)
        if found is not None:
            self.hits += 1
            self._compiled.move_to_end(key)
            return found
        self.misses += 1
        made = self._compiled[key] = self._threads.submit(self._make, field, text)
        if len(self._compiled) > self._kept:
            self._compiled.popitem(last=False)
        return made

    def close(self) -> None:
        """End the threads; what is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make(self, field: str, text: str) -> Matcher:
        vocabulary = self.vocabulary
        inner = self._engine(translate(field, text, self._specials))
        if inner.is_error():
            place = self._place(text) if field == "json_schema" else ""
            raise Refused(field, first_line(inner.get_error()), place)
        matcher = Matcher(inner, vocabulary)
        try:
            # The first mask is the slowest, and shows whether there is any output at all.
            matcher.mask()
        except Broken as error:
            raise Refused(field, f"nothing can satisfy it: {error}") from None
        return matcher

    def _engine(self, grammar: str) -> LLMatcher:
        return LLMatcher(self.vocabulary.engine, grammar, log_level=0, limits=_LIMITS)

    def _place(self, text: str) -> str:
        """The deepest subschema that the engine refuses on its own, as a JSON Pointer."""
        root = schema.parse(text, "json_schema")
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        until = time.monotonic() + _SEARCH_SECONDS
        for place, node in _objects(root, ""):
            if time.monotonic() > until:
                break
            try:
                own = schema.prepare(json.dumps({**shared, **node}))
            except Refused:
                continue
            if self._engine(json.dumps({"grammars": [{"json_schema": own}]})).is_error():
                return f"#{place}"
        return "#"


def _objects(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object with its place, the deepest first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in pairs:
        if isinstance(child, dict | list):
            yield from _objects(child, step(place, key))
    if isinstance(value, dict):
        yield place, value


def _yield_to_others() -> None:
    """On Linux a niceness is a thread's own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
