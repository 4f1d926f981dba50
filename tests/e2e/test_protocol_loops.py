"""Tool loops and structured answers of the demo model through every protocol's own client."""

import json
from typing import Literal

import anthropic
import ollama
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

MODEL = "headrace-demo"
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
RESULT = '{"temperature": 21, "sky": "sunny"}'
ABOUT = "Get the current weather of a city"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


class Wheel(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    kind: Literal["overshot", "undershot"]


class GetWeather(BaseModel, extra="forbid"):
    """Get the current weather of a city"""

    city: str = Field(max_length=12)


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as found:
        yield found


def test_anthropic(demo_server):
    tool = {"name": "get_weather", "description": ABOUT, "input_schema": CITY}
    ask = {"model": MODEL, "max_tokens": 60, "tools": [tool], "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(
        base_url=demo_server.url, api_key=API_KEY, max_retries=0, timeout=120
    ) as client:
        with client.messages.stream(**ask, messages=ASK) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            message = stream.get_final_message()
        assert message.stop_reason == "tool_use"
        call = next(block for block in message.content if block.type == "tool_use")
        assert call.input == json.loads("".join(pieces)) == {"city": "Rome"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
        answer = client.messages.create(
            **ask,
            messages=[
                *ASK,
                {"role": "assistant", "content": message.content},
                {"role": "user", "content": [result]},
            ],
        )
        assert answer.stop_reason == "end_turn"
        assert "21" in answer.content[0].text
        forced = client.messages.create(**ask, messages=ASK, tool_choice={"type": "any"})
        assert isinstance(forced.content[-1].input["city"], str)


def test_ollama(demo_server):
    client = ollama.Client(host=demo_server.url, headers={"Authorization": f"Bearer {API_KEY}"})
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "description": ABOUT, "parameters": CITY},
    }
    ask = {"model": MODEL, "tools": [tool], "options": {"temperature": 0}}
    message = client.chat(**ask, messages=ASK).message
    assert message.tool_calls[0].function.arguments == {"city": "Rome"}
    streamed = [part.message for part in client.chat(**ask, messages=ASK, stream=True)]
    calls = [call for part in streamed for call in part.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Rome"}]
    result = {"role": "tool", "content": RESULT, "tool_name": "get_weather"}
    assert "21" in client.chat(**ask, messages=[*ASK, message, result]).message.content
    shaped = client.chat(
        model=MODEL, messages=ASK, format=Wheel.model_json_schema(), options={"seed": 1}
    )
    assert Wheel.model_validate_json(shaped.message.content)


def test_responses(client):
    tool = {"type": "function", "name": "get_weather", "description": ABOUT, "parameters": CITY}
    ask = {"model": MODEL, "tools": [{**tool, "strict": True}], "temperature": 0}
    with client.responses.stream(**ask, input=ASK) as stream:
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    call = next(item for item in final.output if item.type == "function_call")
    assert json.loads(call.arguments) == json.loads("".join(pieces)) == {"city": "Rome"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    answer = client.responses.create(**ask, input=[*ASK, *final.output, result])
    assert "21" in answer.output_text
    parsed = client.responses.parse(
        model=MODEL, input=ASK, text_format=Wheel, temperature=1.2, extra_body={"seed": 1}
    )
    assert isinstance(parsed.output_parsed, Wheel)


def test_parsed_arguments_of_a_chat(client):
    tools = [openai.pydantic_function_tool(GetWeather)]
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, tools=tools, tool_choice="required", temperature=1.2, seed=1
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_allowed_tools(client):
    names = ("get_weather", "get_time")
    tools = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in names]
    one = {"type": "function", "function": {"name": "get_time"}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=tools,
        temperature=0,
        max_tokens=60,
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [one]},
        },
    )
    assert {call.function.name for call in answer.choices[0].message.tool_calls} == {"get_time"}


def test_a_history_with_broken_arguments(client):
    """As an agent sends it after a length limit has cut a call."""
    function = {"name": "get_weather", "arguments": '{"city": "Ro'}
    call = {"id": "call_1", "type": "function", "function": function}
    history = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "error: arguments are no JSON"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=history, max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")
