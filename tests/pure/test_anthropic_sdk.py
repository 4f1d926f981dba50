"""/v1/messages through the official `anthropic` package, with a scripted model."""

import json

import anthropic
import httpx
import pytest

from headrace.core.messages import FinishReason
from headrace.server import answers
from headrace.text.parsers.events import Arguments, Content, Reasoning, ToolCall
from tests.support.api_server import CONTEXT, LinesParser, Model, serve

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = [
    Reasoning("Where"),
    Reasoning(" is it?"),
    Content("I look."),
    ToolCall(0, "weather"),
    Arguments(0, '{"city": '),
    Arguments(0, '"Oslo"}'),
    ToolCall(1, "weather", "own-id"),
    Arguments(1, '{"city": "Rome"}'),
]


@pytest.fixture(scope="module")
def running():
    model = Model()
    with serve(model, api_key="secret") as url:
        yield model, url


@pytest.fixture(scope="module")
def sdk(running):
    with anthropic.Anthropic(base_url=running[1], api_key="secret", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def web(running):
    with httpx.Client(base_url=running[1], headers={"x-api-key": "secret"}) as found:
        yield found


@pytest.fixture
def model(running, monkeypatch):
    monkeypatch.setattr(answers, "parser_for", lambda *_: LinesParser())
    return running[0].reset()


@pytest.fixture
def client(sdk, model):
    return sdk


def ask(client, **fields):
    return client.messages.create(**{"model": "tiny", "max_tokens": 50, "messages": HI} | fields)


def test_create(client, model):
    model.cached = 4
    sampling = {"temperature": 0.5, "top_k": 7}
    message = ask(client, system="Be short.", stop_sequences=["x"], extra_body=sampling)
    assert message.content[0].text == "Hello wheel!"
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert message.id.startswith("msg_")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    prompt = len(model.manager.seen[-1].ids) // 4
    assert message.usage.input_tokens == prompt - 4
    assert message.usage.cache_read_input_tokens == 4
    assert message.usage.output_tokens == 4
    assert model.prompts == ["<system>Be short.\n<user>hi\n<assistant>"]
    sampling = model.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.stop) == (0.5, 7, ("x",))
    assert sampling.max_new_tokens == 50


def test_stream_helper(client, model):
    model.turns = [CALL]
    arguments = {"model": "tiny", "max_tokens": 50, "messages": HI, "tools": [WEATHER]}
    with client.messages.stream(**arguments) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    whole = ask(client, tools=[WEATHER])
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = final.content
    assert thinking.thinking == "Where is it?"
    assert thinking.signature
    assert text.text == "I look."
    assert (first.name, first.input) == ("weather", {"city": "Oslo"})
    assert first.id.startswith("toolu_")
    assert (second.id, second.input) == ("own-id", {"city": "Rome"})
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens == len(CALL) + 1
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    streamed, complete = final.to_dict(), whole.to_dict()
    for blocks in (streamed["content"], complete["content"]):
        blocks[2].pop("id")
        for block in blocks:
            block.pop("parsed_output", None)
    assert streamed["content"] == complete["content"]
    assert streamed["usage"] == complete["usage"]


def test_event_bytes(web, model):
    """The framing that other clients read: names, order, a ping, no [DONE]."""
    model.turns = [[Reasoning("hm"), Content("a")]]
    body = {"model": "tiny", "max_tokens": 9, "messages": HI, "stream": True}
    answer = web.post("/v1/messages?beta=true", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [item["type"] for item in data] == names
    assert data[0]["message"]["content"] == []
    assert data[0]["message"]["stop_reason"] is None
    assert data[3]["delta"] == {"type": "thinking_delta", "thinking": "hm"}
    assert data[4]["delta"]["type"] == "signature_delta"
    assert [item.get("index") for item in data[2:9]] == [0, 0, 0, 0, 1, 1, 1]
    assert data[9]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_tool_loop(client, model):
    model.turns = [CALL, [Content("Rain.")]]
    first = ask(client, tools=[WEATHER])
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": text, "is_error": error}
        for block, text, error in zip(
            first.content[2:],
            ["rain", [{"type": "text", "text": "no"}]],
            [False, True],
            strict=True,
        )
    ]
    history = [
        *HI,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    second = ask(client, messages=history, tools=[WEATHER])
    assert second.content[0].text == "Rain."
    assert second.stop_reason == "end_turn"
    tools, _, prompt = model.prompts[1].partition("\n")
    assert json.loads(tools)[0]["function"]["name"] == "weather"
    assert prompt == (
        "<user>hi\n"
        '<assistant>(Where is it?)I look.[weather {"city": "Oslo"}][weather {"city": "Rome"}]\n'
        "<tool>rain\n<tool>Error: no\n<user>So?\n<assistant>"
    )


def test_like_claude_code(client, model):
    """System blocks with cache marks, many tools, a server tool, thinking, beta fields."""
    tools = [WEATHER | {"name": f"tool_{i}"} for i in range(20)]
    raw = client.beta.messages.with_raw_response.create(
        model="tiny",
        max_tokens=20_000,
        betas=["claude-code-20250219"],
        system=[
            {"type": "text", "text": "You are a tool.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be brief."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b"},
            {"role": "system", "content": "<total_tokens>7</total_tokens>"},
            {"role": "user", "content": "c"},
        ],
        tools=[{"type": "web_search_20250305", "name": "web_search"}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u"},
    )
    ignored = raw.headers["x-headrace-ignored"].split(",")
    assert {"metadata", "tools[0]", "thinking.budget_tokens"} <= set(ignored)
    assert model.prompts[0] == (
        "<system>You are a tool. Be brief.\n<user>a\n<assistant>b\n"
        "<system><total_tokens>7</total_tokens>\n<user>c\n<assistant>True"
    )
    assert ask(client, tools=tools[:2]).stop_reason == "end_turn"


def test_count_tokens(client, model):
    counted = client.messages.count_tokens(model="tiny", messages=HI, system="Be short.")
    message = ask(client, system="Be short.")
    assert counted.input_tokens == message.usage.input_tokens
    assert counted.input_tokens > client.messages.count_tokens(model="x", messages=HI).input_tokens


def test_prefill_is_gone_on_with(client, model):
    ask(client, messages=[*HI, {"role": "assistant", "content": "One, two,"}])
    assert model.prompts[0] == "<user>hi\n<assistant>One, two,"


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (FinishReason("stop", matched="END"), ("stop_sequence", "END")),
        (FinishReason("length", length=4), ("max_tokens", None)),
        (FinishReason("stop", matched=3), ("end_turn", None)),
    ],
)
def test_stop_reasons(client, model, finish, expected):
    model.finish = finish
    message = ask(client, max_tokens=4)
    assert (message.stop_reason, message.stop_sequence) == expected


def test_max_tokens_beyond_the_context_fills_it_and_says_so(client, model):
    model.finish = FinishReason("length", length=4)
    message = ask(client, max_tokens=20_000)
    prompt = len(model.manager.seen[-1].ids) // 4
    assert model.requests[0].sampling.max_new_tokens == CONTEXT - prompt
    assert message.stop_reason == "model_context_window_exceeded"


def test_thinking_off_reaches_template_and_parser(client, model, monkeypatch):
    seen = []

    def spy(chat, *_):
        seen.append(chat.thinking)
        return LinesParser()

    monkeypatch.setattr(answers, "parser_for", spy)
    ask(client, thinking={"type": "disabled"})
    ask(client)
    assert model.prompts[0].endswith("<assistant>False")
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "[0].text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": 99.0, "top_p": 7.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_wrong_bodies(web, model, fields, named):
    body = {"model": "tiny", "max_tokens": 5, "messages": HI} | fields
    answer = web.post("/v1/messages", json=body)
    assert answer.status_code == 400
    value = answer.json()
    assert value["type"] == "error"
    assert value["error"]["type"] == "invalid_request_error"
    assert named in value["error"]["message"]


def test_errors_have_the_sdk_classes(client, running, model):
    long = [{"role": "user", "content": "word " * 1000}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        ask(client, messages=long)
    with pytest.raises(anthropic.AuthenticationError) as caught:
        ask(client.with_options(api_key="wrong"))
    assert caught.value.body["error"]["type"] == "authentication_error"
    model.finish = FinishReason("abort", message="full", status=503, kind="x")
    model.turns = [[]]
    with pytest.raises(anthropic.InternalServerError) as busy:
        ask(client)
    assert busy.value.body["error"]["type"] == "overloaded_error"
    assert busy.value.response.headers["retry-after"] == "1"


def test_failure_inside_a_stream(client, model):
    model.finish = FinishReason("abort", message="worker lost", status=500, kind="x")
    with pytest.raises(anthropic.APIStatusError, match="worker lost"):
        list(ask(client, stream=True))


def test_forced_tools_and_schemas_ask_for_a_grammar(client, model, monkeypatch):
    """What the adapter asks of structured output; whether it is kept is tested there."""
    ask(client, tools=[WEATHER], tool_choice={"type": "any"})
    ask(client, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    schema = {"type": "object", "properties": {}}
    ask(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    first, second, third = (request.sampling for request in model.requests)
    assert "weather" in first.structural_tag
    assert json.loads(first.structural_tag) != json.loads(second.structural_tag)
    assert json.loads(third.json_schema) == schema


def test_arguments_cut_by_the_limit_stay_an_object(client, model):
    model.turns = [[ToolCall(0, "weather"), Arguments(0, '{"city": "Os')]]
    model.finish = FinishReason("length", length=50)
    message = ask(client, tools=[WEATHER])
    assert message.content[0].input == {"partial_json": '{"city": "Os'}
