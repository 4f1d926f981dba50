"""The fewest tokens of a text, by its length alone: never more than the tokenizer really makes."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from headrace.text.bounds import longest_piece

LETTERS = {char: i for i, char in enumerate("abcdefgh▁é")}
MERGED = LETTERS | {"ab": 20, "abab": 21, "▁a": 22}
MERGES = [("a", "b"), ("ab", "ab"), ("▁", "a")]


def bytewise(normalizer=None) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"ab": 300, "abab": 301}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES[:2]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def piecewise(**options) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(MERGED | {"<unk>": 50}, MERGES, **options))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


BOUNDED = {
    "bytes": bytewise(),
    "composed": bytewise(normalizers.NFC()),
    "pieces": piecewise(unk_token="<unk>"),
}


@pytest.mark.parametrize("name", BOUNDED)
@given(
    text=st.text(alphabet=st.sampled_from("abé e\u0301\u0308한\u1112\u1161\u11ab字"), max_size=80)
)
def test_no_text_has_fewer_tokens(name, text):
    backend = BOUNDED[name]
    longest = longest_piece(backend)
    assert longest is not None
    assert len(backend.encode(text).ids) >= len(text) // longest


def test_the_longest_piece_counts():
    assert longest_piece(bytewise()) == 4
    assert longest_piece(bytewise(normalizers.NFC())) == 16
    grown = bytewise()
    grown.add_special_tokens(["<|end_of_text|>"])
    assert longest_piece(grown) == 15


def test_where_characters_may_vanish_nothing_is_promised():
    swallowing = bytewise()
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True)])
    words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    dropped = bytewise()
    dropped.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )
    halves = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    halves.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for backend in (
        swallowing,
        words,
        dropped,
        bytewise(normalizers.Strip()),
        bytewise(normalizers.Replace(tokenizers.Regex(" +"), " ")),
        halves,
        piecewise(),  # what it does not know is left out
        piecewise(unk_token="<unk>", fuse_unk=True),
    ):
        assert longest_piece(backend) is None
