"""The official OpenAI client against a real server with the demo model."""

import openai
import pytest

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

MODEL = "headrace-demo"
HELLO = [{"role": "user", "content": "Hello! How are you?"}]


@pytest.fixture(scope="module")
def client(demo_server):
    with openai.OpenAI(
        base_url=f"{demo_server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120
    ) as found:
        yield found


@pytest.fixture(scope="module")
def greedy(client):
    """The answer that the other tests compare with."""
    return client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat(client, greedy):
    choice = greedy.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert greedy.usage.total_tokens == greedy.usage.prompt_tokens + greedy.usage.completion_tokens
    assert greedy.id.startswith("chatcmpl-")
    assert greedy._request_id == greedy.id


def test_repeated_prompt_reports_cached_tokens(client, greedy):
    again = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, *HELLO], temperature=0, max_tokens=1
    )
    third = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, *HELLO], temperature=0, max_tokens=1
    )
    assert third.choices[0].message.content == again.choices[0].message.content
    cached = third.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < third.usage.prompt_tokens


def test_logprobs_belong_to_the_text(greedy):
    content = greedy.choices[0].logprobs.content
    assert len(content) == greedy.usage.completion_tokens
    data = b"".join(bytes(item.bytes) for item in content)
    assert data.decode().startswith(greedy.choices[0].message.content)
    for item in content:
        assert item.logprob <= 0.0
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob
        assert item.top_logprobs[0].token == item.token, "greedy takes the most probable"


def test_stream_gives_the_same_text(client, greedy):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == greedy.choices[0].message.content
    assert [c.usage is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == greedy.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == greedy.choices[0].finish_reason


def test_stream_helper_accumulates(client, greedy):
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24, logprobs=True
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert final.choices[0].message.content == greedy.choices[0].message.content
    assert len(final.choices[0].logprobs.content) == greedy.usage.completion_tokens


def test_samples_differ_but_seeds_repeat(client):
    def sample() -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, temperature=1.5, seed=7, n=4, max_tokens=16
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens > 4
        return [choice.message.content for choice in answer.choices]

    first = sample()
    assert len(set(first)) > 1
    assert sample() == first


def test_stop_string(client, greedy):
    text = greedy.choices[0].message.content
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24, stop=[middle, "@@"]
    )
    choice = answer.choices[0]
    assert choice.message.content == text[: text.index(middle)]
    assert (choice.finish_reason, choice.matched_stop) == ("stop", middle)


def test_tools_reach_the_prompt(client):
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
    }
    plain = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    with_tool = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, tools=[tool]
    )
    assert with_tool.usage.prompt_tokens > plain.usage.prompt_tokens + 5


def test_completions(client):
    answer = client.completions.create(
        model=MODEL, prompt=["The sky is", "One plus one"], max_tokens=8, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens <= 16
    stream = client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_score_of_a_prompt(client, demo_server):
    """What lm-eval does: echo, logprobs=1, max_tokens=1, prompts as token ids."""
    text = "The sky is blue"
    plain = client.completions.create(
        model=MODEL, prompt=text, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0, "return_token_ids": True}
    ids = client.completions.create(
        model=MODEL, prompt=text, max_tokens=0, extra_body=body
    ).choices[0]
    again = client.completions.create(
        model=MODEL,
        prompt=[ids.prompt_token_ids],
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
    )
    found = again.choices[0].logprobs
    assert found.token_logprobs == plain.choices[0].logprobs.token_logprobs
    assert found.token_logprobs[:-1] == ids.logprobs.token_logprobs
    assert found.token_logprobs[0] is None
    assert all(value <= 0.0 for value in found.token_logprobs[1:])
    assert plain.choices[0].text.startswith(text)
    assert "".join(found.tokens[: len(ids.prompt_token_ids)]).endswith(text)
    for token, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert max(top.values()) >= token


def test_errors_are_the_clients_classes(client, demo_server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10**6)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1, stream=True)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="must be text"):
        client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "xml"})
    wrong = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_ignored_fields_are_told(client):
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=1, user="me"
    )
    assert answer.headers["x-headrace-ignored"] == "user"
