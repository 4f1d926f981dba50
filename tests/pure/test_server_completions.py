"""/v1/completions as a pair of pure functions: bodies to requests, deltas to bytes."""

import json

import pytest

from headrace.core.config import Config
from headrace.core.errors import BadRequest, NotFound, Unsupported
from headrace.core.messages import (
    Delta,
    FinishReason,
    LogprobSpec,
    TokenLogprobs,
    unpack_ids,
)
from headrace.server import openai_completions
from headrace.server.context import Context, Job, Stamp
from headrace.server.logprobs import CompletionLogprobs, token_string
from headrace.text.tokenizer import Tokenizer
from tests.support import tokenizers
from tests.support.scripted_manager import ScriptedManager

STAMP = Stamp("cmpl-1", 1700000000)
STOP = FinishReason("stop", matched="\n")


def context(**options) -> Context:
    config = Config.from_flat({"served_model_name": "tiny"} | options)
    manager = ScriptedManager(config)
    return Context.create(manager, config, manager.info, started=0)


def job(body: dict, **options) -> Job:
    return openai_completions.parse(json.dumps(body).encode(), context(**options), STAMP)


def delta(text: str = "", ids: tuple[int, ...] = (), **fields) -> Delta:
    counts = {"prompt_tokens": 3, "completion_tokens": len(ids), "cached_tokens": 2}
    return Delta("cmpl-1", ids=list(ids), text=text, **counts | fields)


def whole(body: dict, *deltas: tuple[int, Delta]) -> dict:
    reply = job(body).reply
    for index, item in deltas:
        reply.add(index, item)
    return reply.result()


def chunks(body: dict, *deltas: tuple[int, Delta]) -> list[dict]:
    reply = job({**body, "stream": True}).reply
    data = b"".join(reply.event(index, item) for index, item in deltas) + reply.end()
    return [json.loads(line.removeprefix(b"data: ")) for line in data.split(b"\n\n") if line]


def test_stream_bytes():
    reply = job({"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}).reply
    head = b'data: {"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"tiny",'
    assert reply.event(0, delta('say "é"', (5,))) == (
        head + b'"choices":[{"index":0,"text":"say \\"\xc3\xa9\\"","logprobs":null,'
        b'"finish_reason":null,"matched_stop":null}],"usage":null}\n\n'
    )
    assert reply.event(0, delta("", (6,))) == b"", "held-back text makes no event"
    assert reply.event(0, delta("!", (7,), finish=STOP, completion_tokens=3)) == (
        head + b'"choices":[{"index":0,"text":"!","logprobs":null,'
        b'"finish_reason":"stop","matched_stop":"\\n"}],"usage":null}\n\n'
    )
    assert reply.end() == (
        head + b'"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,'
        b'"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
    )


def test_text_that_looks_like_the_slot_and_a_model_name_with_quotes():
    slot = "\0slot\0"
    (first,) = chunks({"prompt": "a", "model": f'my "{slot}'}, (0, delta(slot, (5,))))
    assert first["model"] == f'my "{slot}'
    assert first["choices"][0]["text"] == slot
    assert "usage" not in first


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts(prompt, expected):
    requests = job({"prompt": prompt}).requests
    found = [r.text if r.text is not None else unpack_ids(r.ids).tolist() for r in requests]
    assert found == expected


def test_ids_of_samples_and_prompts():
    assert [r.rid for r in job({"prompt": "a"}).requests] == ["cmpl-1"]
    rids = [r.rid for r in job({"prompt": ["a", "b"], "n": 2}).requests]
    assert rids == ["cmpl-1-0_0", "cmpl-1-0_1", "cmpl-1-1_0", "cmpl-1-1_1"]
    assert [r.rid for r in job({"prompt": ["a", "b"], "rid": ["x", "y"]}).requests] == ["x", "y"]
    assert job({"prompt": "a", "rid": "mine"}).id == "mine"


def test_sampling_fields():
    body = {
        "prompt": "a",
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 1.5},
        "seed": 42,
        "stop": ["x", "y"],
        "stop_regex": "[0-9]",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "priority": 3,
        "cache_salt": "tenant",
        "extra_key": "more",
    }
    (request,) = job(body).requests
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed) == (5, 2, 42)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert (sampling.stop, sampling.stop_regex) == (("x", "y"), ("[0-9]",))
    assert sampling.stop_token_ids == (9,)
    assert sampling.ignore_eos and sampling.no_stop_trim and not sampling.skip_special_tokens
    assert (request.priority, request.namespace) == (3, "tenant\0more")


def test_defaults_of_sampling():
    body = {"prompt": "a", "top_p": None, "max_tokens": None, "model": None, "stop": None}
    plain = job(body).requests[0].sampling
    assert (plain.max_new_tokens, plain.temperature, plain.top_k) == (16, 0.6, 20)
    openai = job(body, sampling_defaults="openai").requests[0].sampling
    assert (openai.temperature, openai.top_k) == (1.0, -1)
    preferred = '{"max_new_tokens": 9, "temperature": 0.1}'
    own = job(body, preferred_sampling_params=preferred).requests[0].sampling
    assert (own.max_new_tokens, own.temperature, own.top_k) == (9, 0.1, 20)
    asked = job(body | {"temperature": 0.9}, preferred_sampling_params=preferred).requests[0]
    assert asked.sampling.temperature == 0.9


def test_whole_answer():
    answer = whole({"prompt": "a"}, (0, delta("Hi", (5,))), (0, delta("!", (6,), finish=STOP)))
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "Hi!",
            "logprobs": None,
            "finish_reason": "stop",
            "matched_stop": "\n",
        }
    ]
    assert (answer["id"], answer["object"], answer["model"]) == (
        "cmpl-1",
        "text_completion",
        "tiny",
    )


def test_usage_counts_each_prompt_once():
    end = {"finish": STOP, "completion_tokens": 4}
    answer = whole(
        {"prompt": ["a", "b"], "n": 2}, *((i, delta("x", (5,), **end)) for i in range(4))
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_continuous_usage():
    found = chunks(
        {"prompt": "a", "stream_options": {"continuous_usage_stats": True}},
        (0, delta("a", (5,))),
        (0, delta("b", (6,), completion_tokens=2, finish=STOP)),
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in found] == [1, 2]
    assert all(chunk["choices"] for chunk in found)


def test_echo_precedes_each_choice_once():
    deltas = [(i, delta(" b", (5,))) for i in (1, 0)] + [(0, delta(" c", (6,), finish=STOP))]
    found = chunks({"prompt": "a", "n": 2, "echo": True}, *deltas)
    assert [(c["choices"][0]["index"], c["choices"][0]["text"]) for c in found] == [
        (1, "a b"),
        (0, "a b"),
        (0, " c"),
    ]


def test_echo_of_token_ids_is_their_text():
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    ids = tokenizer.encode("Hello wheel")
    answer = whole({"prompt": ids, "echo": True}, (0, delta("!", (5,), finish=STOP)))
    assert answer["choices"][0]["text"] == "Hello wheel!"


def test_scored_prompt_for_lm_eval():
    """echo + logprobs + max_tokens 1 gives aligned lists for prompt and answer."""
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    ids = [tokenizer.special_id("<s>"), *tokenizer.encode("Hello wheel", False)]
    best = tokenizer.encode(" stone", False)[0]
    scored = TokenLogprobs(
        tokens=ids,
        values=[None, -2.0, -1.0],
        top=[None, [(best, -0.5)], [(ids[2], -1.0)]],
    )
    new = TokenLogprobs(tokens=[best], values=[-0.25], top=[[(best, -0.25)]])
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    assert job(body).requests[0].logprobs == LogprobSpec(start=0, top=1)
    last = delta(" stone", (best,), finish=STOP, logprobs=new, input_logprobs=scored)
    expected = {
        "tokens": ["<s>", "Hello", " wheel", " stone"],
        "token_logprobs": [None, -2.0, -1.0, -0.25],
        "top_logprobs": [
            None,
            {" stone": -0.5, "Hello": -2.0},
            {" wheel": -1.0},
            {" stone": -0.25},
        ],
        "text_offset": [0, 0, 5, 11],
    }
    choice = whole(body, (0, last))["choices"][0]
    assert choice["logprobs"] == expected
    assert choice["text"] == "Hello wheel stone"
    assert chunks(body, (0, last))[0]["choices"][0]["logprobs"] == expected


def test_logprobs_of_a_stream_are_those_of_each_chunk():
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    a, b = tokenizer.encode("wheel", False)[0], tokenizer.encode("!", False)[0]
    one = TokenLogprobs(tokens=[a], values=[-1.0], top=[])
    two = TokenLogprobs(tokens=[b], values=[float("-inf")], top=[])
    first, second = chunks(
        {"prompt": "a", "logprobs": 0},
        (0, delta("", (a,), logprobs=one)),
        (0, delta("wheel!", (b,), logprobs=two, finish=STOP)),
    )
    assert first["choices"][0]["logprobs"]["token_logprobs"] == [-1.0]
    assert second["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    assert second["choices"][0]["logprobs"]["text_offset"] == [len(tokenizer.token_text(a))]


def test_pieces_of_a_character():
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    ids = tokenizer.encode("ß€", False)
    assert len(ids) > 2, "the tokenizer must split these characters for the test to mean something"
    logprobs = CompletionLogprobs(tokenizer, at_start=False, skip_special_tokens=True)
    found = logprobs.render(TokenLogprobs(tokens=ids, values=[-1.0] * len(ids)))
    assert max(found["text_offset"]) <= 2
    assert all(token.startswith("bytes:") or token in "ß€" for token in found["tokens"])
    assert token_string(b"\xe2\x82") == "bytes:\\xe2\\x82"


def test_token_ids_come_back():
    body = {"prompt": "Hello", "return_token_ids": True}
    prompt = Tokenizer(tokenizers.backend("byte_level")).encode("Hello")
    choice = whole(body, (0, delta("x", (5,))), (0, delta("y", (6,), finish=STOP)))["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([5, 6], prompt)
    first, second = chunks(body, (0, delta("x", (5,))), (0, delta("", (6,), finish=STOP)))
    assert first["choices"][0]["prompt_token_ids"] == prompt
    assert [c["choices"][0]["token_ids"] for c in (first, second)] == [[5], [6]]
    assert "prompt_token_ids" not in second["choices"][0]


def test_ignored_fields_are_told():
    found = job({"prompt": "a", "user": "me", "best_of": 3, "frobnicate": 1, "store": None})
    assert found.ignored == ["user", "best_of", "frobnicate"]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [1, "a"]}, "prompt", "prompt"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": {"a": 1}}, "prompt", "string"),
        ({"prompt": "a", "n": 129}, "n", "128"),
        ({"prompt": "a", "n": 0}, "n", "1"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "more than 4096"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ({"prompt": "a", "seed": 2**64}, "seed", "9223372036854775807"),
        ({"prompt": "a", "rid": ["x", "y"]}, "rid", "2 ids for 1 prompts"),
        ({"prompt": "a", "rid": "two words"}, "rid", "pattern"),
    ],
)
def test_wrong_bodies_name_the_field(body, field, words):
    with pytest.raises(BadRequest) as caught:
        job(body)
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"prompt": NaN}', b"[" * 10**5]
)
def test_bodies_that_are_no_object(raw):
    with pytest.raises(BadRequest):
        openai_completions.parse(raw, context(), STAMP)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("guided_regex", "a+"),
        ("lora_path", "x"),
    ],
)
def test_what_would_change_the_answer_is_refused(field, value):
    with pytest.raises(Unsupported, match=field):
        job({"prompt": "a", field: value})


def test_harmless_values_of_refused_fields():
    body = {"prompt": "a", "response_format": {"type": "text"}, "regex": None, "suffix": ""}
    assert job(body).ignored == []


def test_strict_model_name():
    assert job({"prompt": "a", "model": "other"}).requests
    assert job({"prompt": "a", "model": "tiny"}, strict_model_name=True).requests
    with pytest.raises(NotFound, match="'other'") as caught:
        job({"prompt": "a", "model": "other"}, strict_model_name=True)
    assert caught.value.code == "model_not_found"
