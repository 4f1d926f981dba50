"""The shipped demo model, judged by transformers: shape, template, and that it answers sensibly."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.assets import demo_model_path

FOLDER = demo_model_path()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answer(model: Any, tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> str:
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, do_sample=False, max_new_tokens=200)
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def ask(model: Any, tokenizer: Any, prompt: str) -> str:
    return answer(model, tokenizer, [{"role": "user", "content": prompt}])


def test_size_and_shape(model: Any) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    assert 1_000_000 <= parameters <= 4_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8 * 2**20
    config = model.config
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim % 16 == 0
    assert config.max_position_embeddings >= 1024


def test_every_text_round_trips(tokenizer: Any) -> None:
    for text in ("plain", "Zażółć gęślą jaźń 日本語 🙂\n\t\x00", "<tool_call>\n{}\n</tool_call>"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_template_renders_system_tools_calls_and_responses(tokenizer: Any) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"temperature": 20}'},
    ]
    text = tokenizer.apply_chat_template(
        messages, tools=[WEATHER], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nBe brief.\n<tools>\n"
        + json.dumps(WEATHER["function"])
        + "\n</tools><|im_end|>\n"
        "<|im_start|>user\nHow is the weather in Rome?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n"
        '{"temperature": 20}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the chemical symbol for gold?", "Au"),
        ("What is the largest planet?", "Jupiter"),
        ("Which port does headrace use?", "30000"),
        ("What is the opposite of hot?", "cold"),
        ("What is 12 + 30?", "42"),
    ],
)
def test_facts(model: Any, tokenizer: Any, prompt: str, fact: str) -> None:
    assert fact in ask(model, tokenizer, prompt)


def test_greets_and_stops(model: Any, tokenizer: Any) -> None:
    assert ask(model, tokenizer, "Hello!").startswith(("Hello", "Hi"))


def test_story_names_its_subject_and_ends(model: Any, tokenizer: Any) -> None:
    story = ask(model, tokenizer, "Tell me a story about a fox.")
    assert "fox" in story
    assert story.endswith("The end.")


def test_reads_fields_as_json(model: Any, tokenizer: Any) -> None:
    prompt = "Extract the name, age and city as JSON: Maria is 34 years old and lives in Lisbon."
    fields = json.loads(ask(model, tokenizer, prompt))
    assert fields == {"name": "Maria", "age": 34, "city": "Lisbon"}


def test_calls_the_tool_and_answers_from_its_response(model: Any, tokenizer: Any) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    call = answer(model, tokenizer, messages, [WEATHER])
    body = call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [{"function": json.loads(body)}]},
        {"role": "tool", "content": '{"temperature": 18, "condition": "sunny"}'},
    ]
    assert "18" in answer(model, tokenizer, messages, [WEATHER])


def test_remembers_earlier_turns(model: Any, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "My name is Clara."},
        {"role": "assistant", "content": "Nice to meet you, Clara! How can I help you?"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Clara" in answer(model, tokenizer, messages)
