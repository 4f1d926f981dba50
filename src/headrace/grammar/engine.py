"""What a backend is: the language it reads, and the engine that makes masks of it.

    Backend   translates what a request asks for (or refuses it); pure, known by name
    Engine    compiles that, for one vocabulary
    Matcher   where one output stands in its grammar: which tokens may come next

The table of backends; an engine's library is imported when it is first needed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from headrace.grammar import source, source_xgrammar
from headrace.grammar.vocabulary import Vocabulary


class Broken(Exception):
    """The grammar exceeds the limits of a step, or a token does not fit; the text says which."""


class Matcher(Protocol):
    """The state after some tokens; belongs to one request, used by one thread at a time."""

    def copy(self) -> "Matcher":
        """Another one in the same state, for another output."""
        ...

    def mask(self) -> bytes:
        """Allowed tokens, int32 little-endian [words]; releases the GIL.

        Raises:
            Broken: the step exceeds the engine's limits, or nothing may follow and the output is
                not complete.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            Broken: the mask did not allow it.
        """
        ...

    def write(self, text: str) -> None:
        """Go on by a text, which cannot be taken back. Raises `Broken`: it does not fit."""
        ...

    def fits(self, token: int) -> bool:
        """`accept`, unless the token does not fit."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        ...

    @property
    def complete(self) -> bool:
        """The text so far is a sentence of the grammar."""
        ...

    @property
    def ended(self) -> bool:
        """Nothing but an end of sequence may follow."""
        ...


class Engine(Protocol):
    """Compiles for one vocabulary; used by several threads at once."""

    def start(self, field: str, program: str) -> Matcher:
        """A matcher at the beginning of what `Backend.translate` wrote.

        Raises:
            Refused: the engine cannot enforce it.
        """
        ...


class Backend(NamedTuple):
    """One of the libraries that enforce grammars."""

    name: str
    translate: Callable[[str, str, Mapping[str, int]], str]
    """(field, text, special tokens by their text) -> the engine's own language; or `Refused`."""
    module: str
    packages: tuple[str, ...]
    """What must be installed; the first one is named in errors."""

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(name) is not None for name in self.packages)

    def engine(self, vocabulary: Vocabulary) -> Engine:
        """Takes a part of a second for a large vocabulary."""
        made: Engine = importlib.import_module(self.module).build_engine(vocabulary)
        return made


LLGUIDANCE = Backend(
    "llguidance", source.translate, "headrace.grammar.engine_llguidance", ("llguidance",)
)
XGRAMMAR = Backend(
    "xgrammar",
    source_xgrammar.translate,
    "headrace.grammar.engine_xgrammar",
    ("xgrammar", "tvm_ffi"),
)
BACKENDS = {"auto": LLGUIDANCE, "llguidance": LLGUIDANCE, "xgrammar": XGRAMMAR}
