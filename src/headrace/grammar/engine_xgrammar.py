"""The optional engine, xgrammar. What it would ignore was refused before it is asked.

Its tokens are bytes, as ours are; special tokens never match. Its matcher says no for a token that
does not fit and stays where it is.
"""

import re

import numpy as np
import xgrammar

from headrace.grammar.engine import Broken
from headrace.grammar.refusal import Refused
from headrace.grammar.vocabulary import Vocabulary

_WHERE = re.compile(r"^\[[\d:]+\] \S+?:\d+: ")


class XGrammarEngine:
    """xgrammar for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        tokens = [b"" if i in vocabulary.special else t for i, t in enumerate(vocabulary.tokens)]
        tokens += [b""] * (not vocabulary.eos)
        info = xgrammar.TokenizerInfo(
            tokens,
            xgrammar.VocabType.RAW,
            vocab_size=len(tokens),
            stop_token_ids=list(vocabulary.ends),
        )
        self._width = len(tokens)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def start(self, field: str, program: str) -> "XGrammarMatcher":
        try:
            compiled = self._compiler.compile_structural_tag(program)
        except (RuntimeError, ValueError) as error:
            raise Refused(field, _first_line(error)) from None
        return XGrammarMatcher(xgrammar.GrammarMatcher(compiled), self._vocabulary, self._width)


build_engine = XGrammarEngine


class XGrammarMatcher:
    """See `Matcher`. `width`: tokens of a mask."""

    def __init__(self, inner: xgrammar.GrammarMatcher, vocabulary: Vocabulary, width: int) -> None:
        self._inner = inner
        self._vocabulary = vocabulary
        self._width = width
        self._bits = np.zeros(-(-width // 32), dtype=np.int32)

    def copy(self) -> "XGrammarMatcher":
        return XGrammarMatcher(self._inner.fork(), self._vocabulary, self._width)

    def mask(self) -> bytes:
        if self._inner.is_terminated():
            return self._ends_only()
        # Without this, a mask that allows everything would be left as it was.
        self._bits.fill(-1)
        self._inner.fill_next_token_bitmask(self._bits.reshape(1, -1), 0)
        found = self._bits.astype("<i4", copy=False).tobytes()
        if not self._bits.any():
            raise Broken("no token can continue the output")
        return found[: 4 * self._vocabulary.words]

    def _ends_only(self) -> bytes:
        bits = np.zeros(32 * self._vocabulary.words, np.uint8)
        bits[list(self._vocabulary.eos)] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token: int) -> None:
        if not self.fits(token):
            raise Broken(f"token {token} does not fit")

    def write(self, text: str) -> None:
        if text and not self._inner.accept_string(text.encode()):
            raise Broken("the text does not fit")

    def fits(self, token: int) -> bool:
        return bool(self._inner.accept_token(token))

    def rollback(self, count: int) -> None:
        if count:
            self._inner.rollback(count)

    @property
    def complete(self) -> bool:
        return bool(self._inner.is_terminated() or self._inner.is_completed())

    @property
    def ended(self) -> bool:
        if self._inner.is_terminated():
            return True
        if not self._inner.is_completed():
            return False
        self.mask()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        bits[list(self._vocabulary.ends)] = 0
        return not bits[: self._width].any()


def _first_line(error: Exception) -> str:
    return _WHERE.sub("", str(error)).strip().split("\n")[0][:300] or "cannot be compiled"
