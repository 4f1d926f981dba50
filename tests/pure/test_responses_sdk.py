"""/v1/responses through the official `openai` package, with a scripted model."""

import json
import time

import httpx
import openai
import pydantic
import pytest

from headrace.core.messages import FinishReason
from headrace.server import answers
from headrace.text.parsers.events import Arguments, Content, Reasoning, ToolCall
from tests.support.api_server import LinesParser, Model, serve

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
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
    with serve(model, enable_response_store=True, response_store_size=3) as url:
        yield model, url


@pytest.fixture(scope="module")
def sdk(running):
    with openai.OpenAI(base_url=running[1] + "/v1", api_key="any", max_retries=0) as found:
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


def ask(client, text="hi", **fields):
    return client.responses.create(**{"model": "tiny", "input": text} | fields)


def bare(response) -> list[dict]:
    """Output items without their random ids."""
    items = [item.to_dict() for item in response.output]
    for item in items:
        item.pop("id")
        item.pop("parsed_arguments", None)
        if item.get("call_id", "").startswith("call_"):
            item.pop("call_id")
        for part in item.get("content", []):
            part.pop("parsed", None)
    return items


def test_create(client, model):
    model.cached = 4
    response = ask(
        client, instructions="Be short.", temperature=0.5, max_output_tokens=50, metadata={"a": "b"}
    )
    assert response.output_text == "Hello wheel!"
    assert (response.object, response.status, response.model) == ("response", "completed", "tiny")
    assert response.id.startswith("resp_")
    assert response.metadata == {"a": "b"}
    prompt = len(model.manager.seen[-1].ids) // 4
    assert response.usage.input_tokens == prompt
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert response.usage.output_tokens == 4
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == prompt + 4
    assert model.prompts == ["<system>Be short.\n<user>hi\n<assistant>"]
    sampling = model.requests[0].sampling
    assert (sampling.temperature, sampling.max_new_tokens) == (0.5, 50)


def test_stream_helper_equals_the_whole(client, model):
    model.turns = [CALL]
    with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    whole = ask(client, tools=[WEATHER])
    assert [item.type for item in final.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert final.output[0].content[0].text == "Where is it?"
    assert final.output[2].arguments == '{"city": "Oslo"}'
    assert final.output[3].call_id == "own-id"
    assert final.output[2].id != final.output[2].call_id
    assert bare(final) == bare(whole)
    assert final.usage == whole.usage
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_event_order(web, model):
    """What clients that check every event see: names, places, ids."""
    model.turns = [CALL[1:6]]
    body = {"model": "tiny", "input": "hi", "stream": True, "tools": [WEATHER]}
    answer = web.post("/v1/responses", json=body)
    events = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    names = [name.removeprefix("event: response.") for name, _ in events]
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    assert [item["type"] for item in data] == [f"response.{name}" for name in names]
    assert [item["output_index"] for item in data[2:-1]] == [0] * 6 + [1] * 6 + [2] * 5
    assert data[0]["response"]["status"] == "in_progress"
    assert data[0]["response"]["tools"] == [WEATHER]
    for item in data[3:7]:
        assert item["item_id"] == data[2]["item"]["id"]
    assert data[13]["item"]["content"][0]["text"] == "I look."
    assert data[17]["arguments"] == '{"city": "Oslo"}'
    assert data[-1]["response"]["output"] == [data[i]["item"] for i in (7, 13, 18)]


def test_parse(client, model, monkeypatch):
    class Place(pydantic.BaseModel):
        city: str

    model.turns = [[Content('{"city":'), Content('"Oslo"}')]]
    response = client.responses.parse(model="tiny", input="where?", text_format=Place)
    assert response.output_parsed == Place(city="Oslo")
    assert response.text.format.type == "json_schema"
    with client.responses.stream(model="tiny", input="where?", text_format=Place) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
    assert done[0].parsed == Place(city="Oslo")
    assert [json.loads(r.sampling.json_schema)["required"] for r in model.requests] == [
        ["city"]
    ] * 2
    client.responses.create(model="tiny", input="a", text={"format": {"type": "json_object"}})
    assert json.loads(model.requests[-1].sampling.json_schema) == {"type": "object"}


def test_tool_loop_with_items(client, model):
    model.turns = [CALL, [Content("Rain.")]]
    history = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}]
    first = ask(client, history, tools=[WEATHER])
    history += first.output
    history += [
        {"type": "function_call_output", "call_id": call.call_id, "output": output}
        for call, output in zip(
            first.output[2:], ["rain", [{"type": "input_text", "text": "sun"}]], strict=True
        )
    ]
    second = ask(client, history, tools=[WEATHER])
    assert second.output_text == "Rain."
    tools, _, prompt = model.prompts[1].partition("\n")
    assert json.loads(tools)[0]["function"]["name"] == "weather"
    assert prompt == (
        "<system>Be short.\n<user>hi\n"
        '<assistant>(Where is it?)I look.[weather {"city": "Oslo"}][weather {"city": "Rome"}]\n'
        "<tool>rain\n<tool>sun\n<assistant>"
    )


def test_previous_response(client, model):
    model.turns = [[Content("One.")], [Content("Two.")], [Content("Three.")]]
    first = ask(client, "a", instructions="Count.")
    second = ask(client, "b", previous_response_id=first.id)
    with client.responses.stream(model="tiny", input="c", previous_response_id=second.id) as stream:
        third = stream.get_final_response()
    assert model.prompts[2] == (
        "<user>a\n<assistant>One.\n<user>b\n<assistant>Two.\n<user>c\n<assistant>"
    )
    assert third.previous_response_id == second.id
    assert client.responses.retrieve(third.id).output_text == "Three."
    items = client.responses.input_items.list(second.id).data
    assert [item.content for item in items] == ["b"]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        ask(client, previous_response_id=second.id)


def test_store_is_bounded_and_optional(client, model):
    kept = [ask(client).id for _ in range(4)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept[0])
    assert client.responses.retrieve(kept[1]).id == kept[1]
    private = ask(client, store=False)
    assert private.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(private.id)


def test_background(client, model):
    response = ask(client, background=True)
    assert response.status == "queued"
    deadline = time.monotonic() + 10
    while client.responses.retrieve(response.id).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = client.responses.retrieve(response.id)
    assert (done.status, done.output_text) == ("completed", "Hello wheel!")
    model.endless = True
    endless = ask(client, background=True)
    with pytest.raises(openai.BadRequestError, match="still being made"):
        ask(client, previous_response_id=endless.id)
    assert client.responses.cancel(endless.id).status == "cancelled"
    assert client.responses.retrieve(endless.id).status == "cancelled"
    model.endless = False
    with pytest.raises(openai.BadRequestError, match="Only a background"):
        client.responses.cancel(ask(client).id)
    with pytest.raises(openai.BadRequestError, match="background"):
        ask(client, background=True, stream=True)


def test_without_a_store(monkeypatch):
    monkeypatch.setattr(answers, "parser_for", lambda *_: LinesParser())
    with (
        serve(Model()) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client,
    ):
        raw = client.responses.with_raw_response.create(model="tiny", input="hi", store=True)
        assert raw.headers["x-headrace-ignored"] == "store"
        assert raw.parse().store is False
        for fields in ({"background": True}, {"previous_response_id": "resp_1"}):
            with pytest.raises(openai.BadRequestError, match="--enable-response-store"):
                ask(client, **fields)
        with pytest.raises(openai.NotFoundError, match="--enable-response-store"):
            client.responses.retrieve("resp_1")


def test_cut_answers_are_incomplete(client, model):
    model.finish = FinishReason("length", length=4)
    response = ask(client, max_output_tokens=4)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert list(ask(client, stream=True))[-1].type == "response.incomplete"


def test_logprobs(client, model):
    model.turns = [[Reasoning("hm"), Content("a"), Content("b")]]
    response = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    assert model.requests[0].logprobs.top == 2
    assert response.output[1].content[0].logprobs == []  # the script has none
    assert model.requests[0].stream


def test_like_codex(client, model):
    """Server tools beside functions, free-text tools, fields without effect."""
    model.turns = [[ToolCall(0, "apply"), Arguments(0, '{"inp'), Arguments(0, 'ut": "*** a"}')]]
    custom = {
        "type": "custom",
        "name": "apply",
        "description": "Applies.",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
    }
    fields = {
        "tools": [WEATHER, custom, {"type": "web_search"}],
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "parallel_tool_calls": False,
        "store": False,
    }
    raw = client.responses.with_raw_response.create(model="tiny", input="hi", **fields)
    ignored = set(raw.headers["x-headrace-ignored"].split(","))
    assert ignored == {"tools[2]", "include", "parallel_tool_calls", "reasoning.summary"}
    call = raw.parse().output[0]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "apply", "*** a")
    assert "start: X" in model.prompts[0]
    with client.responses.stream(model="tiny", input="hi", **fields) as stream:
        kinds = [event.type for event in stream]
    assert "response.custom_tool_call_input.done" in kinds
    history = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        call,
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"},
    ]
    model.turns = [[Content("ok")]]
    assert ask(client, history).output_text == "ok"
    assert model.prompts[-1] == (
        '<user>hi\n<assistant>[apply {"input": "*** a"}]\n<tool>done\n<assistant>'
    )


def test_allowed_tools_narrow_the_list(client, model):
    other = WEATHER | {"name": "other"}
    choice = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "other"}],
    }
    ask(client, tools=[WEATHER, other], tool_choice=choice)
    tools = json.loads(model.prompts[0].partition("\n")[0])
    assert [tool["function"]["name"] for tool in tools] == ["other"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"conversation": "c"}, "conversation"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_wrong_bodies(web, model, fields, named):
    answer = web.post("/v1/responses", json={"input": "hi"} | fields)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_overflow_has_the_code_that_agents_match(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "word " * 1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_output_tokens") as caught:
        ask(client, max_output_tokens=1024)
    assert caught.value.code == "context_length_exceeded"


def test_failure_inside_a_stream(client, model):
    model.finish = FinishReason("abort", message="worker lost", status=500, kind="x")
    last = list(ask(client, stream=True))[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.message) == ("failed", "worker lost")
