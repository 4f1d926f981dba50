"""Ollama's routes through the official `ollama` package, with a scripted model."""

import json

import httpx
import ollama
import pytest

from headrace.core.messages import FinishReason
from headrace.server import answers
from headrace.server import ollama as routes
from headrace.text.parsers.events import Arguments, Content, Reasoning, ToolCall
from tests.support.api_server import LinesParser, Model, serve

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = [
    Reasoning("hm"),
    Content("I"),
    Content(" look."),
    ToolCall(0, "weather"),
    Arguments(0, '{"city": '),
    Arguments(0, '"Oslo"}'),
]


@pytest.fixture(scope="module")
def running():
    model = Model()
    with serve(model) as url:
        yield model, url


@pytest.fixture(scope="module")
def sdk(running):
    return ollama.Client(host=running[1])


@pytest.fixture
def model(running, monkeypatch):
    monkeypatch.setattr(answers, "parser_for", lambda *_: LinesParser())
    monkeypatch.setattr(routes, "TextParser", LinesParser)
    return running[0].reset()


@pytest.fixture
def client(sdk, model):
    return sdk


def test_chat(client, model):
    answer = client.chat(
        model="tiny", messages=HI, options={"temperature": 0.5, "num_predict": 9, "top_k": 0}
    )
    assert answer.message.content == "Hello wheel!"
    assert (answer.model, answer.done, answer.done_reason) == ("tiny", True, "stop")
    assert answer.created_at.endswith("Z")
    assert answer.eval_count == 4
    assert answer.prompt_eval_count == len(model.manager.seen[-1].ids) // 4
    assert answer.prompt_eval_duration == 2000
    assert answer.total_duration == answer.eval_duration + 3000
    sampling = model.requests[0].sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.top_k) == (0.5, 9, -1)
    assert not model.requests[0].stream


def test_stream_equals_the_whole(client, model):
    model.turns = [CALL]
    parts = list(client.chat(model="tiny", messages=HI, tools=[WEATHER], stream=True))
    whole = client.chat(model="tiny", messages=HI, tools=[WEATHER])
    assert "".join(part.message.content for part in parts) == whole.message.content == "I look."
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking == "hm"
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [call.function.arguments for call in calls] == [{"city": "Oslo"}]
    assert calls[0].function == whole.message.tool_calls[0].function
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count


def test_tool_loop(client, model):
    model.turns = [CALL, [Content("Rain.")]]
    history = [*HI, client.chat(model="tiny", messages=HI, tools=[WEATHER]).message]
    history.append({"role": "tool", "tool_name": "weather", "content": "rain"})
    answer = client.chat(model="tiny", messages=history, tools=[WEATHER])
    assert answer.message.content == "Rain."
    assert model.prompts[1].partition("\n")[2] == (
        '<user>hi\n<assistant>(hm)I look.[weather {"city": "Oslo"}]\n<tool>rain\n<assistant>'
    )


def test_generate(client, model):
    answer = client.generate(model="tiny:latest", prompt="hi", system="Be short.")
    assert answer.response == "Hello wheel!"
    assert model.prompts == ["<system>Be short.\n<user>hi\n<assistant>"]
    again = client.generate(model="tiny", prompt="more", context=answer.context, stream=True)
    assert "".join(part.response for part in again) == "Hello wheel!"
    assert model.prompts[1].startswith(model.prompts[0])
    assert model.prompts[1].endswith("<user>more\n<assistant>")


def test_generate_raw(client, model):
    assert client.generate(model="tiny", prompt="Once", raw=True).response == "Hello wheel!"
    assert model.prompts == ["<s>Once"]


def test_empty_prompts_load(client, model):
    assert client.generate(model="tiny", prompt="").done_reason == "load"
    assert client.chat(model="tiny", messages=[]).done_reason == "load"
    assert model.requests == []


def test_think_reaches_the_template(client, model):
    client.chat(model="tiny", messages=HI, think=False)
    client.chat(model="tiny", messages=HI, think="high")
    assert [prompt[-5:] for prompt in model.prompts] == ["False", ">True"]


def test_num_predict_is_only_a_limit(client, model):
    model.finish = FinishReason("length", length=4)
    answer = client.chat(model="tiny", messages=HI, options={"num_predict": 100_000})
    assert answer.done_reason == "length"
    assert model.requests[0].sampling.max_new_tokens is not None
    client.chat(model="tiny", messages=HI, options={"num_predict": -1, "seed": -1})
    assert model.requests[1].sampling.max_new_tokens == model.requests[0].sampling.max_new_tokens


def test_format_asks_for_a_grammar(client, model, monkeypatch):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat(model="tiny", messages=HI, format=schema)
    client.generate(model="tiny", prompt="hi", format="json", raw=True)
    assert [json.loads(r.sampling.json_schema) for r in model.requests] == [
        schema,
        {"type": "object"},
    ]


def test_models(client, model):
    listed = client.list().models
    assert [item.model for item in listed] == ["tiny"]
    assert [item.model for item in client.ps().models] == ["tiny"]
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["llama.context_length"] == 256
    assert "messages" in shown.template


def test_ignored_options_are_told(running, model):
    body = {
        "model": "tiny",
        "messages": HI,
        "stream": False,
        "options": {"num_ctx": 9, "mirostat": 1},
        "keep_alive": "5m",
    }
    answer = httpx.post(f"{running[1]}/api/chat", content=json.dumps(body))  # as curl -d sends it
    assert answer.status_code == 200
    named = set(answer.headers["x-headrace-ignored"].split(","))
    assert named == {"options.num_ctx", "options.mirostat", "keep_alive"}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c: c.chat("tiny", messages=[{"role": "robot", "content": "a"}]), "[0].role"),
        (lambda c: c.chat("tiny", messages=[HI[0] | {"images": ["aGk="]}]), "images"),
        (lambda c: c.generate("tiny", prompt="a", suffix="b"), "suffix"),
        (lambda c: c.generate("tiny", prompt="a", template="b"), "template"),
        (lambda c: c.chat("tiny", messages=HI, options={"temperature": -1}), "temperature"),
        (lambda c: c.chat("tiny", messages=HI, options={"stop": [1]}), "stop"),
        (lambda c: c.chat("tiny", messages=[HI[0] | {"content": "word " * 1000}]), "longer than"),
        (lambda c: c.embed("tiny", "a"), "embeddings"),
    ],
)
def test_wrong_bodies(client, model, call, named):
    with pytest.raises(ollama.ResponseError) as caught:
        call(client)
    assert caught.value.status_code == 400
    assert named in caught.value.error


def test_failure_inside_a_stream(client, model):
    model.finish = FinishReason("abort", message="worker lost", status=500, kind="x")
    with pytest.raises(ollama.ResponseError, match="worker lost"):
        list(client.chat(model="tiny", messages=HI, stream=True))


def test_strict_names():
    with serve(Model(), strict_model_name=True) as url:
        client = ollama.Client(host=url)
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(model="other", messages=HI)
        assert caught.value.status_code == 404
        assert client.show("tiny:latest").details.family == "llama"
