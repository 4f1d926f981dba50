"""/v1/chat/completions as a pair of pure functions: bodies to requests, deltas to bytes."""

import json

import pytest

from headrace.core.config import Config
from headrace.core.errors import BadRequest, Unsupported
from headrace.core.messages import Delta, FinishReason, LogprobSpec, TokenLogprobs, unpack_ids
from headrace.server import openai_chat
from headrace.server.context import Context, Job, Stamp
from headrace.text.chat import TemplateManager
from headrace.text.tokenizer import Tokenizer
from tests.support import tokenizers
from tests.support.scripted_manager import ScriptedManager

STAMP = Stamp("chatcmpl-1", 1700000000)
STOP = FinishReason("stop", matched=3)
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "get", "parameters": {}}}


def context(**options) -> Context:
    config = Config.from_flat({"served_model_name": "tiny"} | options)
    manager = ScriptedManager(config)
    return Context.create(manager, config, manager.info, started=0)


def job(body: dict, **options) -> Job:
    body = {"messages": HI} | body
    return openai_chat.parse(json.dumps(body).encode(), context(**options), STAMP)


def prompt_of(body: dict) -> str:
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    ids = unpack_ids(job(body).requests[0].ids).tolist()
    return tokenizer.decode(ids, skip_special_tokens=False)


def delta(text: str = "", ids: tuple[int, ...] = (), **fields) -> Delta:
    counts = {"prompt_tokens": 3, "completion_tokens": len(ids), "cached_tokens": 2}
    return Delta("chatcmpl-1", ids=list(ids), text=text, **counts | fields)


def chunks(body: dict, *deltas: tuple[int, Delta]) -> list[dict]:
    reply = job({**body, "stream": True}).reply
    data = b"".join(reply.event(index, item) for index, item in deltas) + reply.end()
    return [json.loads(line.removeprefix(b"data: ")) for line in data.split(b"\n\n") if line]


def whole(body: dict, *deltas: tuple[int, Delta]) -> dict:
    reply = job(body).reply
    for index, item in deltas:
        reply.add(index, item)
    return reply.result()


def test_stream_bytes():
    reply = job({"stream": True, "stream_options": {"include_usage": True}}).reply
    head = (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
        b'"model":"tiny","choices":['
    )
    open_end = b',"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}\n\n'
    assert reply.event(0, delta("Hi", (5,))) == (
        head
        + b'{"index":0,"delta":{"role":"assistant","content":"","reasoning_content":null}'
        + open_end
        + head
        + b'{"index":0,"delta":{"content":"Hi","reasoning_content":null}'
        + open_end
    )
    assert reply.event(0, delta("", (6,))) == b""
    assert reply.event(0, delta("!", (7,), completion_tokens=3, finish=STOP)) == (
        head
        + b'{"index":0,"delta":{"content":"!","reasoning_content":null}'
        + open_end
        + head
        + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","matched_stop":3}],'
        b'"usage":null}\n\n'
    )
    assert reply.end() == head + (
        b'],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,'
        b'"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
    )


def test_every_choice_opens_and_closes():
    deltas = [(i, delta("x", (5,))) for i in (2, 0, 1)] + [
        (i, delta(finish=STOP)) for i in range(3)
    ]
    found = chunks({"n": 3}, *deltas)
    by_choice: dict[int, list[dict]] = {}
    for chunk in found:
        by_choice.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    assert sorted(by_choice) == [0, 1, 2]
    for choice in by_choice.values():
        assert [sorted(part["delta"]) for part in choice] == [
            ["content", "reasoning_content", "role"],
            ["content", "reasoning_content"],
            [],
        ]
        assert [part["finish_reason"] for part in choice] == [None, None, "stop"]


def test_whole_answer():
    answer = whole(
        {}, (0, delta("Hi", (5,))), (0, delta("!", (6,), completion_tokens=2, finish=STOP))
    )
    assert answer == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hi!",
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 3,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_logprobs_have_bytes_and_each_token_its_own_alternatives():
    tokenizer = Tokenizer(tokenizers.backend("byte_level"))
    part = tokenizer.encode("€", False)
    found = TokenLogprobs(
        tokens=part[:2],
        values=[-1.0, -2.0],
        top=[[(part[0], -1.0), (part[2], -3.0)], [(part[1], -2.0), (part[0], -4.0)]],
    )
    body = {"logprobs": True, "top_logprobs": 2}
    assert job(body).requests[0].logprobs == LogprobSpec(start=-1, top=2)
    content = chunks(body, (0, delta("", tuple(part[:2]), logprobs=found)))[1]["choices"][0][
        "logprobs"
    ]["content"]
    assert [bytes(item["bytes"]) for item in content] == [
        tokenizer.token_bytes(token) for token in part[:2]
    ]
    assert [[top["logprob"] for top in item["top_logprobs"]] for item in content] == [
        [-1.0, -3.0],
        [-2.0, -4.0],
    ]
    answer = whole(body, (0, delta("€", tuple(part[:2]), logprobs=found, finish=STOP)))
    assert answer["choices"][0]["logprobs"]["content"] == content


def test_prompt_is_the_rendered_template():
    assert prompt_of({}) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of({"add_generation_prompt": False}) == "<|im_start|>user\nhi<|im_end|>\n"
    talk = [*HI, {"role": "assistant", "content": "The wheel"}]
    body = {"messages": talk, "continue_final_message": True}
    assert prompt_of(body).endswith("<|im_start|>assistant\nThe wheel")
    assert '"get"' in prompt_of({"tools": [TOOL]})
    assert '"get"' not in prompt_of({"tools": [TOOL], "tool_choice": "none"})
    assert '"get"' not in prompt_of({"tools": None, "tool_choice": None})


def test_template_variables():
    found = context()
    found.manager.templates = TemplateManager({"default": "{{ reasoning_effort }} {{ depth }}"})
    body = {
        "messages": HI,
        "reasoning_effort": "high",
        "chat_template_kwargs": {"depth": 3},
        "tools": [TOOL],
    }
    job = openai_chat.parse(json.dumps(body).encode(), found, STAMP)
    ids = unpack_ids(job.requests[0].ids).tolist()
    assert found.manager.tokenizer.decode(ids) == "high 3"
    assert job.ignored == ["tools"], "a template that prints no tools is told"


def test_input_ids_take_the_place_of_messages():
    found = job({"messages": None, "input_ids": [5, 6], "return_token_ids": True})
    assert unpack_ids(found.requests[0].ids).tolist() == [5, 6]


def test_token_ids_come_back():
    body = {"input_ids": [5, 6], "messages": None, "return_token_ids": True}
    first, second, _ = chunks(body, (0, delta("x", (7,), finish=STOP)))
    assert first["choices"][0]["prompt_token_ids"] == [5, 6]
    assert second["choices"][0]["token_ids"] == [7]
    choice = whole(body, (0, delta("x", (7,), finish=STOP)))["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], [7])


def test_length_of_the_answer():
    assert job({}).requests[0].sampling.max_new_tokens is None, "the context is filled"
    assert job({"max_tokens": 5}).requests[0].sampling.max_new_tokens == 5
    body = {"max_tokens": 5, "max_completion_tokens": 6}
    assert job(body).requests[0].sampling.max_new_tokens == 6
    preferred = job({}, preferred_sampling_params='{"max_new_tokens": 7}')
    assert preferred.requests[0].sampling.max_new_tokens == 7


def test_cached_tokens_only_when_reported():
    config = {"enable_cache_report": False}
    reply = job({}, **config).reply
    reply.add(0, delta("x", (5,), finish=STOP))
    assert reply.result()["usage"]["prompt_tokens_details"] is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": "x"}, "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"n": 10**9}, "n"),
    ],
)
def test_wrong_bodies_name_the_field(body, field):
    with pytest.raises(BadRequest) as caught:
        job(body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "grammars"),
    [
        ({}, []),
        ({"response_format": {"type": "text"}}, []),
        ({"json_schema": None, "regex": ""}, []),
        ({"response_format": {"type": "json_object"}}, [("json_schema", '{"type":"object"}')]),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"b": 1, "a": 2}},
                }
            },
            [("json_schema", '{"b":1,"a":2}')],
        ),
        ({"regex": "a+"}, [("regex", "a+")]),
        ({"ebnf": "root ::= [a]"}, [("ebnf", "root ::= [a]")]),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
            [("structural_tag", '{"type":"structural_tag","format":{"type":"any_text"}}')],
        ),
    ],
)
def test_grammars(body, grammars):
    (request,) = job(body).requests
    assert request.sampling.grammars == grammars


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_object"}, "json_schema": "{}"},
    ],
)
def test_wrong_response_formats(body):
    with pytest.raises(BadRequest) as caught:
        job(body)
    assert caught.value.field == "response_format"


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": "a+"}},
        {"functions": [{"name": "get"}]},
        {"audio": {"voice": "x"}},
    ],
)
def test_what_would_change_the_answer_is_refused(body):
    with pytest.raises(Unsupported, match=next(iter(body))):
        job({"tools": [TOOL]} | body)


def test_server_without_tokenizer_says_so():
    found = context()
    found.manager.tokenizer = found.manager.templates = None
    with pytest.raises(BadRequest, match="skip-tokenizer-init"):
        openai_chat.parse(json.dumps({"messages": HI}).encode(), found, STAMP)
