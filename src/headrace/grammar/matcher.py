"""Where one output stands in its grammar: which tokens may come next.

Wraps the engine's matcher, which never raises for what a grammar does: it goes into an error state,
turned into `Broken` here. A matcher belongs to one request and is used by one thread at a time.
"""

from llguidance import LLMatcher

from headrace.grammar.vocabulary import Vocabulary


class Broken(Exception):
    """The grammar exceeds the limits of a step, or a token does not fit; the text says which."""


class Matcher:
    """The state after some tokens; starts at the beginning of the grammar."""

    def __init__(self, inner: LLMatcher, vocabulary: Vocabulary) -> None:
        self._inner = inner
        self._vocabulary = vocabulary

    def copy(self) -> "Matcher":
        """Another one in the same state, for another output."""
        return Matcher(self._inner.deep_copy(), self._vocabulary)

    def mask(self) -> bytes:
        """Allowed tokens, int32 little-endian [words]; releases the GIL.

        Raises:
            Broken: the step exceeds the engine's limits, or nothing may follow and the output is
                not complete: there, the engine would let it end.
        """
        found = self._inner.compute_bitmask()
        self._check()
        if self.ended and not self.complete:
            raise Broken("no token can continue the output")
        return found[: 4 * self._vocabulary.words]

    def accept(self, token: int) -> None:
        """Go on by one token.

        Raises:
            Broken: the mask did not allow it.
        """
        if not self._inner.consume_token(token):
            self._check()
            raise Broken(f"token {token} does not fit")

    def fits(self, token: int) -> bool:
        """`accept`, unless the token does not fit."""
        return self._inner.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        if count and not self._inner.rollback(count):
            self._check()

    @property
    def complete(self) -> bool:
        """The text so far is a sentence of the grammar."""
        return self._inner.is_accepting()

    @property
    def ended(self) -> bool:
        """Nothing but an end of sequence may follow."""
        return self._inner.is_stopped()

    def _check(self) -> None:
        if self._inner.is_error():
            raise Broken(first_line(self._inner.get_error()))


def first_line(error: str) -> str:
    """The engine's message without its state."""
    return error.split("\n<")[0].split("\n")[0].strip()[:300] or "too complex"
