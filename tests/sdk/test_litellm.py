"""LiteLLM as a client: the provider mapping must find what it looks for in our answers."""

import json

import litellm
import pytest

from tests.sdk.conftest import API_KEY, MODEL

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
KIND = {
    "type": "object",
    "properties": {"kind": {"enum": ["overshot", "undershot"]}, "count": {"type": "integer"}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request, base_url):
    """litellm.completion by one of the providers that people use for such a server."""

    def call(messages=ASK, **fields):
        return litellm.completion(
            model=f"{request.param}/{MODEL}",
            api_base=base_url,
            api_key=API_KEY,
            messages=messages,
            temperature=0,
            num_retries=0,
            timeout=120,
            **fields,
        )

    return call


def test_stream_gives_the_same_answer_and_usage(ask):
    hello = [{"role": "user", "content": "Hello! How are you?"}]
    whole = ask(hello, max_tokens=24)
    chunks = list(ask(hello, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=hello)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason
    assert built.usage.completion_tokens == whole.usage.completion_tokens > 0
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens > 0


def test_tool_loop_streamed_and_whole(ask):
    whole = ask(tools=[WEATHER]).choices[0]
    assert whole.finish_reason == "tool_calls"
    call = whole.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    built = litellm.stream_chunk_builder(list(ask(tools=[WEATHER], stream=True)), messages=ASK)
    assert built.choices[0].finish_reason == "tool_calls"
    assert built.choices[0].message.tool_calls[0].function == call.function
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}
    answer = ask([*ASK, whole.message.model_dump(), result], tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "stop"
    assert "21" in answer.message.content


def test_required_tool(ask):
    tools = [WEATHER]
    choice = ask([{"role": "user", "content": "Hello!"}], tools=tools, tool_choice="required")
    call = choice.choices[0].message.tool_calls[0]
    assert isinstance(json.loads(call.function.arguments)["city"], str)


def test_json_schema(ask):
    form = {"type": "json_schema", "json_schema": {"name": "k", "schema": KIND, "strict": True}}
    text = ask(response_format=form, max_tokens=60).choices[0].message.content
    assert json.loads(text)["kind"] in ("overshot", "undershot")


def test_errors_are_its_classes(ask):
    with pytest.raises(litellm.ContextWindowExceededError):
        ask([{"role": "user", "content": "wheel " * 20_000}])
    with pytest.raises(litellm.BadRequestError):
        ask(top_p=7)


def test_text_completion(base_url):
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=base_url,
        api_key=API_KEY,
        prompt="The sky is",
        max_tokens=8,
        temperature=0,
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 8


def test_responses(base_url):
    answer = litellm.responses(
        model=f"openai/{MODEL}", api_base=base_url, api_key=API_KEY, input="Hello!", temperature=0
    )
    assert answer.status == "completed"
    assert answer.output[-1].content[0].text


def test_anthropic(demo_server):
    answer = litellm.completion(
        model=f"anthropic/{MODEL}",
        api_base=demo_server.url,
        api_key=API_KEY,
        messages=ASK,
        tools=[WEATHER],
        temperature=0,
        max_tokens=60,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}


def test_ollama(demo_server):
    answer = litellm.completion(
        model=f"ollama_chat/{MODEL}",
        api_base=demo_server.url,
        api_key=API_KEY,
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=16,
        temperature=0,
    )
    assert answer.choices[0].message.content
