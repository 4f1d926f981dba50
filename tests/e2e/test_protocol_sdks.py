"""Anthropic's, Ollama's and OpenAI's clients against one real server: one model, one answer."""

import anthropic
import ollama
import openai
import pytest

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

MODEL = "headrace-demo"
HELLO = [{"role": "user", "content": "Hello! How are you? " * 4}]
LENGTH = 24


@pytest.fixture(scope="module")
def openai_client(demo_server):
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as found:
        yield found


@pytest.fixture(scope="module")
def expected(openai_client):
    """The answer of the chat route, which the other protocols must give too."""
    answer = openai_client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=LENGTH
    )
    return answer.choices[0].message.content.strip(), answer.usage


def test_anthropic(demo_server, expected):
    text, usage = expected
    ask = {"model": MODEL, "max_tokens": LENGTH, "messages": HELLO}
    greedy = {"temperature": 0}
    with anthropic.Anthropic(
        base_url=demo_server.url, api_key=API_KEY, max_retries=0, timeout=120
    ) as client:
        whole = client.messages.create(**ask, extra_body=greedy)
        with client.messages.stream(**ask, extra_body=greedy) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_message()
        counted = client.messages.count_tokens(model=MODEL, messages=HELLO)
    assert "".join(block.text for block in whole.content).strip() == text
    assert streamed.strip() == text
    assert final.usage.output_tokens == whole.usage.output_tokens == usage.completion_tokens
    assert counted.input_tokens == usage.prompt_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == usage.prompt_tokens
    assert final.usage.cache_read_input_tokens > 0


def test_responses(openai_client, expected):
    text, usage = expected
    ask = {"model": MODEL, "input": HELLO, "max_output_tokens": LENGTH, "temperature": 0}
    whole = openai_client.responses.create(**ask)
    with openai_client.responses.stream(**ask) as stream:
        streamed = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
    assert whole.output_text.strip() == text
    assert streamed.strip() == text
    assert whole.usage.output_tokens == usage.completion_tokens
    logprobs = openai_client.responses.create(
        **ask, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    told = logprobs.output[0].content[0].logprobs
    assert "".join(item.token for item in told).startswith(logprobs.output_text)
    assert all(len(item.top_logprobs) == 2 for item in told)


def test_ollama(demo_server, expected):
    text, usage = expected
    client = ollama.Client(host=demo_server.url, headers={"Authorization": f"Bearer {API_KEY}"})
    ask = {
        "model": MODEL,
        "messages": HELLO,
        "options": {"temperature": 0, "num_predict": LENGTH},
    }
    whole = client.chat(**ask)
    parts = list(client.chat(**ask, stream=True))
    assert whole.message.content.strip() == text
    assert "".join(part.message.content for part in parts).strip() == text
    assert whole.eval_count == parts[-1].eval_count == usage.completion_tokens
    assert 0 < whole.prompt_eval_duration < whole.total_duration
    assert whole.eval_duration > 0
    listed = client.list().models[0]
    assert listed.model == MODEL
    assert listed.size > 0
