"""Tool calls of the demo model, in a loop of the official OpenAI client against a real server."""

import json

import openai
import pytest

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

MODEL = "headrace-demo"
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as found:
        yield found


def ask(client, messages, **body):
    return client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], temperature=0, **body
    )


def test_the_loop_of_call_and_answer(client):
    choice = ask(client, ASK).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    result = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": '{"temperature": 21, "sky": "sunny"}',
    }
    answer = ask(client, [*ASK, choice.message, result]).choices[0]
    assert answer.finish_reason == "stop"
    assert "21" in answer.message.content


def test_stream_gives_the_same_call(client):
    with client.chat.completions.stream(
        model=MODEL, messages=ASK, tools=[WEATHER], temperature=0
    ) as stream:
        arguments = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.name == "get_weather"
    assert json.loads("".join(arguments)) == {"city": "Rome"}


def test_no_tool_is_called_for_small_talk(client):
    message = ask(client, [{"role": "user", "content": "Hello!"}], max_tokens=24).choices[0].message
    assert message.tool_calls is None
    assert message.content


def test_wrong_tools_are_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, ASK, tool_choice={"type": "function", "function": {"name": "other"}})
    assert caught.value.param == "tool_choice"
