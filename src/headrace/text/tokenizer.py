"""Text to token ids and back, for the vocabulary of one checkpoint folder.

Wraps `tokenizers.Tokenizer`, so a serving process needs neither torch nor transformers. Does not
know streams, templates or models. Two invariants: ids equal those of transformers'
AutoTokenizer, and the bytes of a token do not depend on its neighbors, so text can be built
piece by piece.

tokenizer.json is used as it is written. From files older than itself, transformers 5 rebuilds
the pipelines of LlamaTokenizer and T5Tokenizer, which changes ids for leading spaces and after
special tokens; we keep the ids the model was trained with.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from headrace.core.errors import BadRequest, LoadError
from headrace.text.bounds import longest_piece
from headrace.text.special_tokens import (
    configured_ids,
    named_special_tokens,
    token_content,
    tokenizer_config,
)

# Vocabulary files of other formats, which transformers can convert.
_OTHER_FORMS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
# Decoders whose output for one token depends on the tokens around it.
_CONTEXTUAL_DECODERS = {"BPEDecoder", "CTC"}
# Tokens decoded at once when all are asked for: some milliseconds.
_BATCH = 2048
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One vocabulary.

    `vocab_size` counts added tokens, like `len()` of a transformers tokenizer. `special_ids` are
    the ids that `skip_special_tokens` drops. `eos_token_ids[0]` is the tokenizer's own end token
    if it names one; the others come from the generation config.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._decoders = _decoder_types(backend)
        # Made when the first long text comes: it takes a look at every token.
        self._longest_piece: int | None = None
        self._pieces: dict[int, bytes] = {}
        self._first_pieces: dict[int, bytes] = {}
        # Any ordinary token: what it precedes is not at the start of the text.
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]

    def __contains__(self, token_id: int) -> bool:
        """Whether the id is in the vocabulary; decoding skips ids that are not."""
        return 0 <= token_id < 1 << 32 and self.backend.id_to_token(token_id) is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` runs the post-processor of tokenizer.json (BOS,
        ...)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text. Releases the GIL, so it may run in a thread."""
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise BadRequest("text holds half of a surrogate pair", field="text") from error
        return [encoding.ids for encoding in encodings]

    def fewest_tokens(self, length: int) -> int:
        """How many tokens a text of `length` characters has at least; 0 where nobody can say."""
        if self._longest_piece is None:
            self._longest_piece = longest_piece(self.backend) or sys.maxsize
        return length // self._longest_piece

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """(token ids of both texts, where the second one begins by its token types, else 0)."""
        try:
            encodings = self.backend.encode_batch(list(pairs))
        except TypeError as error:
            raise BadRequest("text holds half of a surrogate pair", field="text") from error
        return [(e.ids, e.type_ids.index(1) if 1 in e.type_ids else 0) for e in encodings]

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of ids; ids outside the vocabulary give nothing.

        `spaces_between_special_tokens` changes nothing here, as in transformers: only its pure
        Python tokenizers put spaces between special tokens.
        """
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise BadRequest("token ids must be between 0 and 2**32 - 1", field="tokens") from error

    def token_text(self, token_id: int) -> str:
        """Text of one token, leading space included; U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that already has other tokens, exactly."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._contribution(self._anchor, token_id)
        return piece

    def all_token_bytes(self, size: int) -> Iterator[bytes]:
        """`token_bytes` of the ids 0 .. size - 1, many at a time; lets other threads run."""
        offset = len(self.decode(self._anchor, skip_special_tokens=False))
        for start in range(0, size, _BATCH):
            ids = range(start, min(size, start + _BATCH))
            pairs = [[*self._anchor, token_id] for token_id in ids]
            texts = self.backend.decode_batch(pairs, skip_special_tokens=False)
            for token_id, text in zip(ids, texts, strict=True):
                piece = text[offset:]
                yield self._raw_bytes(token_id) if "\ufffd" in piece else piece.encode()

    def first_token_bytes(self, token_id: int) -> bytes:
        """What the token gives at the start of a text, where some decoders drop a space."""
        piece = self._first_pieces.get(token_id)
        if piece is None:
            piece = self._first_pieces[token_id] = self._contribution([], token_id)
        return piece

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`."""
        token_id = self.backend.token_to_id(text)
        return token_id if token_id in self.special_ids else None

    def contextual_decoder(self) -> str | None:
        """The name of a decoder that keeps this vocabulary from being decoded piece by piece."""
        return next((name for name in self._decoders if name in _CONTEXTUAL_DECODERS), None)

    def _contribution(self, before: list[int], token_id: int) -> bytes:
        if token_id not in self:
            return b""
        offset = len(self.decode(before, skip_special_tokens=False))
        text = self.decode([*before, token_id], skip_special_tokens=False)[offset:]
        # U+FFFD stands for bytes that are no character on their own: read them from the vocabulary.
        return self._raw_bytes(token_id) if "\ufffd" in text else text.encode()

    def _raw_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) or ""
        if "ByteLevel" in self._decoders and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        if "ByteFallback" in self._decoders and (match := _BYTE_FALLBACK.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; `LoadError` if there is none that can be read."""
    # Threads of a parallel batch do not survive a fork; callers that want them set the variable.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return _load(path)
    except (LoadError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and it may panic
        raise LoadError(f"the tokenizer of {path} cannot be used: {error}") from error


def _load(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
        config = tokenizer_config(path)
        named = named_special_tokens(config)
        backend.add_tokens(_missing_tokens(backend, config, named))
    else:
        backend, named = _convert_other_form(path)
    own_eos = _token_ids(backend, named, "eos_token")
    bos = _token_ids(backend, named, "bos_token")
    return Tokenizer(
        backend,
        eos_token_ids=own_eos + configured_ids(path, "eos_token_id"),
        bos_token_id=bos[0] if bos else None,
    )


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise LoadError(f"{file} cannot be read: {error}") from error


def _missing_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]
) -> list[AddedToken]:
    """Tokens that tokenizer_config.json declares beyond tokenizer.json, in transformers' order.

    The added tokens by id (their flags win over tokenizer.json), then named and extra special
    tokens.
    """
    special_names = set(named.values())
    declared = config.get("added_tokens_decoder") or {}
    tokens = [_added_token(declared[key], special_names) for key in sorted(declared, key=int)]
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    known |= {t.content for t in tokens}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for value in [*named.values(), *(extra if isinstance(extra, list) else [])]:
        text = token_content(value)
        if text is not None and text not in known:
            tokens.append(AddedToken(text, special=True))
            known.add(text)
    return tokens


def _added_token(value: dict[str, Any], special_names: set[str]) -> AddedToken:
    flags = {
        k: v for k, v in value.items() if k in ("lstrip", "rstrip", "normalized", "single_word")
    }
    special = bool(value.get("special")) or value["content"] in special_names
    return AddedToken(value["content"], special=special, **flags)


def _convert_other_form(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Convert a sentencepiece, tiktoken or vocab/merges vocabulary (a slow import)."""
    found = [name for name in _OTHER_FORMS if (path / name).is_file()]
    if not found:
        raise LoadError(f"{path} has no tokenizer.json and no other tokenizer file we know")
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path / found[0]} cannot be converted: {error}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise LoadError(
            f"{path / found[0]} has no form the tokenizers library can run; add a tokenizer.json"
        )
    return backend, dict(converted.special_tokens_map)


def _token_ids(backend: tokenizers.Tokenizer, named: dict[str, str], name: str) -> list[int]:
    token_id = backend.token_to_id(named[name]) if name in named else None
    return [] if token_id is None else [token_id]


def _decoder_types(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """The type names in the decoder of tokenizer.json, nested sequences included."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    pending, names = [state], set()
    while pending:
        node = pending.pop()
        names.add(node["type"])
        pending += node.get("decoders", [])
    return frozenset(names)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
