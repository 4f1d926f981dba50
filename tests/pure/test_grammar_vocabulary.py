"""Real kinds of tokenizers: what a mask allows is what the detokenizer writes."""

import random

import pytest

from headrace.grammar.compiler import Compiler
from headrace.grammar.vocabulary import read_vocabulary
from headrace.text.tokenizer import Tokenizer
from tests.support import tokenizers
from tests.support.grammars import allowed

KINDS = ["byte_level", "byte_fallback", "byte_fallback_gemma", "metaspace"]


def load(kind: str) -> Tokenizer:
    backend = tokenizers.backend(kind)
    return Tokenizer(backend, eos_token_ids=[backend.token_to_id("</s>")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 13])
def test_outputs_are_what_was_asked_for(kind, padding):
    """Whatever is drawn from the masks, the text after a prompt is a sentence of the grammar."""
    tokenizer = load(kind)
    size = tokenizer.vocab_size + padding
    vocabulary = read_vocabulary(tokenizer, size, tokenizer.eos_token_ids)
    compiler = Compiler(lambda: vocabulary, {})
    compiled = compiler.compile("regex", "(the|water|wheel| a){3,6}").result()
    prompt = tokenizer.encode("Hello", add_special_tokens=False)
    before = tokenizer.decode(prompt)
    for seed in range(5):
        dice, matcher, out = random.Random(seed), compiled.copy(), []
        while True:
            ids = allowed(matcher.mask(), size).tolist()
            assert not set(ids) & (tokenizer.special_ids - vocabulary.eos)
            assert max(ids) < tokenizer.vocab_size
            token = dice.choice(ids)
            if token in vocabulary.eos:
                break
            matcher.accept(token)
            out.append(token)
        text = tokenizer.decode(prompt + out)[len(before) :]
        again = compiled.copy()
        assert matcher.complete
        assert b"".join(vocabulary.tokens[token] for token in out) == text.encode()
        assert all(again.fits(token) for token in out)
    compiler.close()


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_at_once(kind):
    tokenizer = load(kind)
    size = tokenizer.vocab_size + 3000
    assert list(tokenizer.all_token_bytes(size)) == [tokenizer.token_bytes(i) for i in range(size)]


@pytest.mark.parametrize("kind", KINDS)
def test_forced_text_is_written_exactly(kind):
    """Also where the tokenizer would put a space in front."""
    tokenizer = load(kind)
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    compiler = Compiler(lambda: vocabulary, {})
    matcher = compiler.compile("regex", "water wheel").result().copy()
    out: list[int] = []
    while not matcher.ended:
        out.append(int(allowed(matcher.mask(), vocabulary.size)[0]))
        matcher.accept(out[-1])
    assert b"".join(vocabulary.tokens[token] for token in out) == b"water wheel"
    compiler.close()
