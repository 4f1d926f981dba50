"""The vocabulary of a model as the engine needs it: the bytes of every token.

Bytes come from our own tokenizer, so a mask allows exactly what the detokenizer will write. Special
tokens and ends of sequence stand for no text: only a grammar that names one lets it pass. Reading a
large vocabulary takes seconds, so it is done once, in a thread, while the weights load.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llguidance import LLTokenizer

from headrace.text.tokenizer import Tokenizer


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
    """What the engine asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int, encode: Any) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def read_vocabulary(tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The vocabulary of a model with logits of width `size`."""
    eos = [token for token in eos_token_ids if token < size]
    special = sorted({token for token in tokenizer.special_ids if token < size} | set(eos))
    known = set(special)
    tokens = [b"" if token in known else tokenizer.token_bytes(token) for token in range(size)]
    named = [*tokens]
    for token in special:
        named[token] = special_name(tokenizer, token)
    if not eos:
        named.append(b"<|end|>")
        special.append(size)
    first = eos or [size]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    source = _Source(named, special, first[0], encode)
    engine = LLTokenizer(source, n_vocab=len(named), eos_token=first)  # type: ignore[arg-type]
    return Vocabulary(engine, size, frozenset(eos), tokens)


def special_name(tokenizer: Tokenizer, token: int) -> bytes:
    """How a special token is written; never empty, as the engine drops empty ones."""
    return (tokenizer.backend.id_to_token(token) or f"<|{token}|>").encode()
