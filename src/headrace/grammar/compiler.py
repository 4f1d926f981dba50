"""Compiles grammars in threads and keeps the compiled ones.

A grammar is known by its field and text, byte by byte. The engine is made of the vocabulary when
the first grammar comes, in a thread, too. The engine's limits bound memory and the time of a step;
a compilation that takes too long fails the requests that wait for it, at their deadline, and goes
on alone. Its threads yield to the model's. Knows no requests.
"""

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from headrace.grammar import schema
from headrace.grammar.engine import LLGUIDANCE, Backend, Broken, Engine, Matcher
from headrace.grammar.refusal import Refused, step
from headrace.grammar.vocabulary import Vocabulary

KEPT = 256
_THREADS = 2
_NICE = 10
# Time to find the place in a schema that the engine refuses.
_SEARCH_SECONDS = 0.5


class Compiler:
    """Owns the threads, the cache, the vocabulary and the engine.

    `on_compiled` is told, in a thread, how many seconds a compilation took, also one that refused.
    """

    def __init__(
        self,
        read: Callable[[], Vocabulary],
        specials: Mapping[str, int],
        backend: Backend = LLGUIDANCE,
        *,
        kept: int = KEPT,
    ) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "grammar", initializer=_yield_to_others)
        self._read = read
        self._specials = specials
        self._backend = backend
        self._kept = kept
        self._made: Future[tuple[Vocabulary, Engine]] | None = None
        self._compiled: OrderedDict[tuple[str, str], Future[Matcher]] = OrderedDict()
        self.on_compiled: Callable[[float], None] = lambda seconds: None
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """Waits until it is read; there is nothing to wait for once anything is compiled."""
        return self._prepared().result()[0]

    def compile(self, field: str, text: str) -> "Future[Matcher]":
        """A matcher at the beginning of the grammar, to be copied; or a `Refused`."""
        key = (field, text)
        found = self._compiled.get(key)
        if found is not None:
            self.hits += 1
            self._compiled.move_to_end(key)
            return found
        self.misses += 1
        # The first thing that the threads get to do.
        self._prepared()
        made = self._compiled[key] = self._threads.submit(self._make, field, text)
        if len(self._compiled) > self._kept:
            self._compiled.popitem(last=False)
            self.evictions += 1
        return made

    def close(self) -> None:
        """End the threads; what is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepared(self) -> "Future[tuple[Vocabulary, Engine]]":
        if self._made is None:
            self._made = self._threads.submit(self._prepare)
        return self._made

    def _prepare(self) -> tuple[Vocabulary, Engine]:
        vocabulary = self._read()
        return vocabulary, self._backend.engine(vocabulary)

    def _make(self, field: str, text: str) -> Matcher:
        _, engine = self._prepared().result()
        began = time.monotonic()
        try:
            return self._compile(engine, field, text)
        finally:
            self.on_compiled(time.monotonic() - began)

    def _compile(self, engine: Engine, field: str, text: str) -> Matcher:
        program = self._backend.translate(field, text, self._specials)
        try:
            matcher = engine.start(field, program)
        except Refused as error:
            place = self._place(engine, text) if field == "json_schema" else ""
            raise Refused(field, error.why, place) from None
        try:
            # The first mask is the slowest, and shows whether there is any output at all.
            matcher.mask()
        except Broken as error:
            raise Refused(field, f"nothing can satisfy it: {error}") from None
        return matcher

    def _place(self, engine: Engine, text: str) -> str:
        """The deepest subschema that the engine refuses on its own, as a JSON Pointer."""
        root = schema.parse(text, "json_schema")
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        until = time.monotonic() + _SEARCH_SECONDS
        for place, node in _objects(root, ""):
            if time.monotonic() > until:
                break
            try:
                own = json.dumps({**shared, **node})
                program = self._backend.translate("json_schema", own, self._specials)
            except Refused:
                continue
            try:
                engine.start("json_schema", program)
            except Refused:
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
