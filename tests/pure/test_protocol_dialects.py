"""The protocols with the real parsers: a model of a real dialect, cut anywhere, streamed or not."""

import anthropic
import ollama
import openai
import pytest

from headrace.core.messages import Delta, FinishReason
from headrace.text.chat import TemplateManager
from tests.support import chat_templates
from tests.support.api_server import Model, serve

TEXT = (
    "<think>\nWhere is it?\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CITY = {"city": "Oslo"}


class Writer(Model):
    """Writes TEXT in pieces of `size` characters."""

    size = 5

    def script(self, request):
        pieces = [TEXT[i : i + self.size] for i in range(0, len(TEXT), self.size)]
        deltas = [Delta(request.rid, ids=[5], text=piece, prompt_tokens=9) for piece in pieces]
        return [*deltas, Delta(request.rid, finish=FinishReason("stop"), prompt_tokens=9)]


@pytest.fixture(scope="module")
def running():
    model = Writer()
    with serve(model) as url:
        model.manager.templates = TemplateManager({"default": chat_templates.QWEN_TOOLS})
        yield model, url


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_anthropic(running, size):
    running[0].size = size
    tool = {"name": "weather", "input_schema": SCHEMA}
    ask = {"model": "tiny", "max_tokens": 99, "messages": HI, "tools": [tool]}
    with anthropic.Anthropic(base_url=running[1], api_key="any", max_retries=0) as client:
        whole = client.messages.create(**ask)
        with client.messages.stream(**ask) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        thinking, text, call = message.content
        assert thinking.thinking.strip() == "Where is it?"
        assert text.text.strip() == "I look."
        assert (call.name, call.input) == ("weather", CITY)
        assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_responses(running, size):
    running[0].size = size
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    ask = {"model": "tiny", "input": "hi", "tools": [tool]}
    with openai.OpenAI(base_url=running[1] + "/v1", api_key="any", max_retries=0) as client:
        whole = client.responses.create(**ask)
        with client.responses.stream(**ask) as stream:
            streamed = stream.get_final_response()
    for response in (whole, streamed):
        reasoning, message, call = response.output
        assert reasoning.content[0].text.strip() == "Where is it?"
        assert message.content[0].text.strip() == "I look."
        assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
        assert response.usage.output_tokens_details is not None


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_ollama(running, size):
    running[0].size = size
    client = ollama.Client(host=running[1])
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    whole = client.chat(model="tiny", messages=HI, tools=[tool])
    parts = list(client.chat(model="tiny", messages=HI, tools=[tool], stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert whole.message.tool_calls[0].function == calls[0].function
    assert calls[0].function.arguments == CITY
    assert whole.message.thinking.strip() == "Where is it?"
    assert "".join(part.message.content for part in parts).strip() == "I look."
    assert "thinking" in client.show("tiny").capabilities
