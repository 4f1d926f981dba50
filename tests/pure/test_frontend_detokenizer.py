"""The detokenizer: token ids of many streams become text, cut where the scheduler ended them."""

import random
import subprocess
import sys

import pytest

from headrace.core.messages import (
    Delta,
    Deltas,
    FinishReason,
    SchedulerStats,
    StreamStart,
    pack_ids,
)
from headrace.frontend.detokenizer import DetokenizerManager
from headrace.text.tokenizer import Tokenizer
from tests.support.tokenizers import byte_fallback_bpe, byte_level_bpe

TOKENIZER = Tokenizer(byte_level_bpe())
LENGTH = FinishReason("length", length=1)
TEXT = "Hello world 🙂 你好 and déjà vu, the wheel turns."


@pytest.fixture
def manager():
    return DetokenizerManager(TOKENIZER)


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def begin(**fields):
    return StreamStart(**{"prompt_tail": pack_ids(encode("Hi"))} | fields)


def feed(manager, pieces, finish=LENGTH, **start):
    """(texts, finish) of one stream that gets its ids in pieces."""
    texts = []
    for i, ids in enumerate(pieces):
        last = i == len(pieces) - 1
        delta = Delta(
            "r", ids, start=begin(**start) if i == 0 else None, finish=finish if last else None
        )
        (out,) = manager.advance(Deltas([delta])).items
        assert out.start is None and out.ids == ids
        texts.append(out.text)
    assert not manager._streams
    return texts, out.finish


@pytest.mark.parametrize("tokenizer", [byte_level_bpe, byte_fallback_bpe])
@pytest.mark.parametrize("seed", range(5))
def test_any_cut_gives_the_whole_text_and_never_half_a_character(tokenizer, seed):
    tokenizer = Tokenizer(tokenizer())
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    tail = tokenizer.encode("Hi", add_special_tokens=False)
    dice = random.Random(seed)
    pieces, rest = [], list(ids)
    while rest:
        size = dice.randint(1, 4)
        pieces.append(rest[:size])
        rest = rest[size:]
    texts, _ = feed(DetokenizerManager(tokenizer), pieces, prompt_tail=pack_ids(tail))
    whole = tokenizer.decode(tail + ids)[len(tokenizer.decode(tail)) :]
    assert "".join(texts) == whole
    assert not any("\ufffd" in text for text in texts)


def test_an_unfinished_character_shows_at_the_end(manager):
    ids = encode("🙂")
    assert len(ids) > 1
    assert feed(manager, [ids[:-1]])[0] == ["\ufffd"]


def test_a_stop_token_gives_no_text_unless_asked(manager):
    ids = encode("abc!")
    stop = FinishReason("stop", matched=ids[-1])
    trimmed = "".join(feed(manager, [ids], stop)[0])
    kept = "".join(feed(manager, [ids], stop, no_stop_trim=True)[0])
    assert (trimmed, kept) == (TOKENIZER.decode(ids[:-1]), TOKENIZER.decode(ids))


def test_special_tokens_are_skipped_unless_asked(manager):
    ids = [*encode("a"), TOKENIZER.special_id("<|im_end|>")]
    assert "".join(feed(manager, [ids])[0]) == "a"
    assert "".join(feed(manager, [ids], skip_special_tokens=False)[0]) == "a<|im_end|>"


@pytest.mark.parametrize("seed", range(5))
def test_text_ends_before_a_stop_string_however_it_is_cut(manager, seed):
    ids = encode("the wheel turns the stone")
    dice = random.Random(seed)
    at = sorted(dice.sample(range(1, len(ids)), 3))
    pieces = [ids[a:b] for a, b in zip([0, *at], [*at, len(ids)], strict=True)]
    stop = FinishReason("stop", matched="turns")
    texts, finish = feed(manager, pieces, stop, stop=("turns", "never"))
    assert "".join(texts) == "the wheel " and finish == stop
    texts, _ = feed(manager, pieces, stop, stop=("turns",), no_stop_trim=True)
    assert "".join(texts) == "the wheel turns"


def test_what_was_held_back_comes_when_it_was_no_stop(manager):
    texts, _ = feed(manager, [encode("the tur")], stop=("turns",))
    assert texts == ["the tur"]
    pieces = [encode("the tur"), encode("tle")]
    texts, _ = feed(manager, pieces, stop=("turns",))
    assert texts == ["the ", "turtle"]


def test_patterns_stop_too(manager):
    stop = FinishReason("stop", matched="[0-9]+ x")
    texts, _ = feed(manager, [encode("a 12"), encode(" x b")], stop, stop_regex=("[0-9]+ x",))
    assert texts == ["a ", ""]


def test_a_pattern_that_takes_too_long_ends_its_stream_with_an_error(manager):
    pieces = [encode("a" * 40), encode("a" * 40 + "!"), encode("b")]
    texts, finish = feed(manager, pieces, stop_regex=("(a|aa)+$x",))
    assert (finish.type, finish.status) == ("abort", 400)
    assert "stop_regex" in finish.message and texts[1:] == ["", ""]


def test_streams_do_not_mix(manager):
    words = {f"r{i}": encode(f"stream number {i} says 🙂") for i in range(20)}
    heard = dict.fromkeys(words, "")
    longest = max(map(len, words.values()))
    for step in range(longest):
        deltas = [
            Delta(
                rid,
                ids[step : step + 1],
                start=begin() if step == 0 else None,
                finish=LENGTH if step == len(ids) - 1 else None,
            )
            for rid, ids in words.items()
            if step < len(ids)
        ]
        out = manager.advance(Deltas(deltas))
        assert [delta.rid for delta in out.items] == [delta.rid for delta in deltas]
        for delta in out.items:
            heard[delta.rid] += delta.text
    assert heard == {rid: TOKENIZER.decode(ids) for rid, ids in words.items()}
    assert not manager._streams


def test_counters_statistics_and_early_ends_pass(manager):
    ended = Delta("x", finish=FinishReason("abort", message="full", status=503))
    counted = Delta("r", [5], prompt_tokens=3, completion_tokens=9, start=begin(), queue_time=0.5)
    stats = SchedulerStats(running=2)
    out = manager.advance(Deltas([ended, counted], stats))
    assert out.items[0] == ended and out.stats == stats
    assert (out.items[1].prompt_tokens, out.items[1].completion_tokens) == (3, 9)
    assert out.items[1].queue_time == 0.5
    assert manager.advance(Deltas([], stats)) == Deltas([], stats)


def test_without_a_tokenizer_nothing_changes():
    deltas = Deltas([Delta("r", [5], start=begin())])
    assert DetokenizerManager(None).advance(deltas) is deltas


def test_the_process_needs_neither_torch_nor_transformers():
    code = (
        "import sys, headrace.engine.process, headrace.engine.parts, headrace.frontend.detokenizer;"
        "print({'torch', 'transformers', 'fastapi', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
