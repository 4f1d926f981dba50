"""Incremental detokenization against full decodes of the tokenizers library."""

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from headrace.core.errors import Unsupported
from headrace.text.detokenize import IncrementalDecoder
from headrace.text.tokenizer import Tokenizer
from tests.support.tokenizers import BUILDERS, backend

TOKENIZERS = {kind: Tokenizer(backend(kind)) for kind in BUILDERS}
KINDS = sorted(TOKENIZERS)
TEXT = "Grüße 🙂 and 👩‍👩‍👧, 你好世界 <|im_end|> the wheel's  water\n\n42"


def stream(tokenizer: Tokenizer, tail: list[int], ids: list[int], cuts: list[int], skip: bool):
    """The pieces that the pushes gave, and the end."""
    decoder = IncrementalDecoder(tokenizer, tail, skip_special_tokens=skip)
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    pieces = [decoder.push(ids[a:b]) for a, b in pairwise(bounds)]
    return pieces, decoder.finish()


def ids_of(kind: str, **sizes: int) -> st.SearchStrategy[list[int]]:
    # Ids just above the vocabulary too: models have padded rows there, decoding skips them.
    return st.lists(st.integers(0, TOKENIZERS[kind].vocab_size + 2), **sizes)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_stream_of_random_ids_is_the_full_decode(kind: str, data, skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    tail = data.draw(ids_of(kind, max_size=4))
    ids = data.draw(ids_of(kind, max_size=12))
    pieces, end = stream(tokenizer, tail, ids, data.draw(st.lists(st.integers(0, 99))), skip)
    text = "".join(pieces) + end
    before = tokenizer.decode(tail, skip)
    full = tokenizer.decode(tail + ids, skip)
    if "\ufffd" not in full + before:
        assert text == full[len(before) :]
        assert end == ""
    elif kind == "byte_level":
        # Equal for broken UTF-8 too, except that a character the tail left unfinished is ours.
        assert full.endswith(text)
        assert 0 <= len(text) - (len(full) - len(before)) <= 1


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(0, 99)))
def test_characters_are_never_split(kind: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces, end = stream(tokenizer, [], ids, cuts, skip=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + end == tokenizer.decode(ids)


@given(raw=st.binary(max_size=40))
def test_any_bytes_of_a_byte_level_vocabulary(raw: bytes) -> None:
    """Broken UTF-8 gives the same text as a full decode, with at most three bytes held back."""
    tokenizer = TOKENIZERS["byte_level"]
    byte_ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in raw]
    decoder = IncrementalDecoder(tokenizer, [])
    text = ""
    for n, token_id in enumerate(ids, start=1):
        text += decoder.push([token_id])
        assert len(raw[:n]) - len(text.encode()) <= 3 or "\ufffd" in text
    text += decoder.finish()
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize(("tail", "expected"), [("Hello", " world"), ("", "world")])
@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace"])
def test_first_space_survives_after_a_prompt(kind: str, tail: str, expected: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("world", add_special_tokens=False)
    tail_ids = tokenizer.encode(tail, add_special_tokens=False)
    assert IncrementalDecoder(tokenizer, tail_ids).push(ids).endswith(expected)
    assert IncrementalDecoder(tokenizer, []).push(ids) == "world"


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("x龍", add_special_tokens=False)
    assert tokenizer.token_text(ids[-1]) == "\ufffd"
    assert IncrementalDecoder(tokenizer, ids[:-1]).push(ids[-1:]) == "龍"


def test_end_inside_a_character_is_flushed_once() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("龍", add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer, [])
    assert decoder.push(ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    shown = IncrementalDecoder(tokenizer, [], skip_special_tokens=False)
    assert IncrementalDecoder(tokenizer, []).push(ids) == "ab"
    assert shown.push(ids) == "a<|im_end|>b"


def test_long_runs_of_bad_bytes_take_linear_time() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    bad = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff")
    decoder = IncrementalDecoder(tokenizer, [])
    assert "".join(decoder.push([bad]) for _ in range(100_000)) == "\ufffd" * 100_000


def test_a_decoder_that_needs_context_is_refused() -> None:
    suffixed = tokenizers.Tokenizer(models.BPE(vocab={"a</w>": 0, "a": 1}, merges=[]))
    suffixed.decoder = decoders.BPEDecoder()
    with pytest.raises(Unsupported, match="BPEDecoder"):
        IncrementalDecoder(Tokenizer(suffixed), [])
