"""The vocabulary of a model as the engines need it: the bytes of every token.

Bytes come from our own tokenizer, so a mask allows exactly what the detokenizer will write. Special
tokens and ends of sequence stand for no text: only a grammar that names one lets it pass. Reading a
large vocabulary takes a good part of a second, so it is done once, in a thread, for the first
request that needs it. No engine.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from headrace.text.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`size` is the width of the logits, `words` that of a mask in int32.

    `tokens`: the text of every token, empty where it never matches. `special`: how special tokens
    are written. Without any end of sequence an engine gets one beyond the logits (`ends`), which
    can never be sampled.
    """

    tokens: Sequence[bytes]
    special: Mapping[int, bytes]
    eos: frozenset[int]
    ends: Sequence[int]
    encode: Encode | None = None

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def words(self) -> int:
        return -(-self.size // 32)

    def text_of(self, token: int) -> bytes:
        """What the token adds to the text, special tokens as they are written."""
        return self.special.get(token) or self.tokens[token]

    def no_end(self) -> bytes:
        """A mask that allows everything but the ends of sequence."""
        mask = bytearray(b"\xff" * (4 * self.words))
        for token in self.eos:
            mask[token // 8] &= ~(1 << token % 8)
        return bytes(mask)


def read_vocabulary(tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
    """The vocabulary of a model with logits of width `size`."""
    ids = tokenizer.special_ids.union(eos_token_ids)
    special = {token: special_name(tokenizer, token) for token in ids if token < size}
    tokens = list(tokenizer.all_token_bytes(size))

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
    texts = list(tokens)
    for token in special:
        texts[token] = b""
    return Vocabulary(texts, special, frozenset(eos), eos or [len(texts)], encode)
