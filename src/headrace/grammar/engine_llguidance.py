"""The default engine, llguidance: refuses what it cannot enforce, and bounds every step.

Its matcher never raises for what a grammar does: it goes into an error state, turned into `Broken`
here. Where text is forced it takes the usual tokens for it, from our tokenizer.
"""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from headrace.grammar.engine import Broken
from headrace.grammar.refusal import Refused
from headrace.grammar.vocabulary import Encode, Vocabulary

_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GuidanceEngine:
    """llguidance for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        named = [vocabulary.special.get(i) or text for i, text in enumerate(vocabulary.tokens)]
        ids = sorted(vocabulary.special)
        if not vocabulary.eos:
            named.append(b"<|end|>")
            ids.append(vocabulary.size)
        source = _Source(named, ids, vocabulary.ends[0], vocabulary.encode)
        self._tokenizer = LLTokenizer(
            source,  # type: ignore[arg-type]
            n_vocab=len(named),
            eos_token=list(vocabulary.ends),
        )
        source.greedy = self._tokenizer.greedy_tokenize

    def start(self, field: str, program: str) -> "GuidanceMatcher":
        inner = LLMatcher(self._tokenizer, program, log_level=0, limits=_LIMITS)
        if inner.is_error():
            raise Refused(field, _first_line(inner.get_error()))
        return GuidanceMatcher(inner, self._tokenizer, self._vocabulary.words)


build_engine = GuidanceEngine


class GuidanceMatcher:
    """See `Matcher`. `words`: of a mask, in int32."""

    def __init__(self, inner: LLMatcher, tokenizer: LLTokenizer, words: int) -> None:
        self._inner = inner
        self._tokenizer = tokenizer
        self._words = words

    def copy(self) -> "GuidanceMatcher":
        return GuidanceMatcher(self._inner.deep_copy(), self._tokenizer, self._words)

    def mask(self) -> bytes:
        found = self._inner.compute_bitmask()
        self._check()
        if self.ended and not self.complete:
            # Here the engine would let it end.
            raise Broken("no token can continue the output")
        return found[: 4 * self._words]

    def accept(self, token: int) -> None:
        if not self._inner.consume_token(token):
            self._check()
            raise Broken(f"token {token} does not fit")

    def write(self, text: str) -> None:
        for token in self._tokenizer.greedy_tokenize(text):
            self.accept(token)

    def fits(self, token: int) -> bool:
        return self._inner.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        if count and not self._inner.rollback(count):
            self._check()

    @property
    def complete(self) -> bool:
        return self._inner.is_accepting()

    @property
    def ended(self) -> bool:
        return self._inner.is_stopped()

    def _check(self) -> None:
        if self._inner.is_error():
            raise Broken(_first_line(self._inner.get_error()))


class _Source:
    """What the engine asks of a tokenizer.

    The usual tokens of a text must be exactly this text, or masks would be wrong: sentencepiece
    puts a space in front.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: list[int], eos: int, encode: Encode | None
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self.greedy: Encode | None = None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if self._encode is not None:
            ids = self._encode(text)
            if b"".join(self.tokens[token] for token in ids) == text.encode():
                return ids
        return self.greedy(text) if self.greedy is not None else []


def _first_line(error: str) -> str:
    """The engine's message without its state."""
    return error.split("\n<")[0].split("\n")[0].strip()[:300] or "too complex"
