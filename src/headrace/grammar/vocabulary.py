"""The vocabulary of a model as the engine needs it: the bytes of every token.

Bytes come from our own tokenizer, so a mask allows exactly what the detokenizer will write. Special
tokens and ends of sequence stand for no text: only a grammar that names one lets it pass. Reading a
large vocabulary takes seconds, so it is done once, in a thread, while the weights load.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from llguidance import LLTokenizer

from headrace.text.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` is the width of the logits, `words` that of a mask in int32.

    Without any end of sequence the engine gets one beyond the logits, which can never be sampled.
    """

    engine: LLTokenizer
    size: int
    eos: frozenset[int]
    tokens: Sequence[bytes]

    @property
    def words(self) -> int:
        return -(-self.size // 32)

    def text_of(self, token: int) -> bytes:
        """What the token adds to the text, special tokens as they are written."""
        return self.engine.decode_bytes([token]) if not self.tokens[token] else self.tokens[token]

    def no_end(self) -> bytes:
        """A mask that allows everything but the ends of sequence."""
        mask = bytearray(b"\xff" * (4 * self.words))
        for token in self.eos:
            mask[token // 8] &= ~(1 << token % 8)
        return bytes(mask)


class _Source:
    """What the engine asks of a tokenizer. Where text is forced, it takes the usual tokens for it.

    They must be exactly this text, or masks would be wrong: sentencepiece puts a space in front.
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


def read_vocabulary(tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The vocabulary of a model with logits of width `size`."""
    ids = tokenizer.special_ids.union(eos_token_ids)
    special = {token: special_name(tokenizer, token) for token in ids if token < size}
    tokens = [b"" if token in special else tokenizer.token_bytes(token) for token in range(size)]

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return ids if all(token < size for token in ids) else []

    return build_vocabulary(tokens, special, eos_token_ids, encode)


def special_name(tokenizer: Tokenizer, token: int) -> bytes:
    """How a special token is written; never empty, as the engine drops empty ones."""
    return (tokenizer.backend.id_to_token(token) or f"<|{token}|>").encode()


def build_vocabulary(
    tokens: Sequence[bytes],
    special: Mapping[int, bytes],
    eos_token_ids: Sequence[int],
    encode: Encode | None = None,
) -> Vocabulary:
    """From the text of every token (empty: never allowed) and the names of special ones."""
    eos = [token for token in eos_token_ids if token < len(tokens)]
    named = [special.get(token, text) for token, text in enumerate(tokens)]
    ids = sorted(special)
    if not eos:
        named.append(b"<|end|>")
        ids.append(len(tokens))
    ends = eos or [len(tokens)]
    source = _Source(named, ids, ends[0], encode)
    engine = LLTokenizer(source, n_vocab=len(named), eos_token=ends)  # type: ignore[arg-type]
    source.greedy = engine.greedy_tokenize
    return Vocabulary(engine, len(tokens), frozenset(eos), tokens)
