"""Tools and reasoning in /v1/chat/completions, through the official client and on the wire.

The server is in-process; a script in place of the scheduler says what a model would.
"""

import functools
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.messages import Delta, FinishReason, GenerateRequest, unpack_ids
from headrace.server import openai_chat
from headrace.server.app import build_app
from headrace.server.context import Context, Stamp
from headrace.text.chat import TemplateManager
from tests.support.scripted_manager import ScriptedManager
from tests.support.transcripts import TOOLS

HI = [{"role": "user", "content": "hi"}]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
)
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    """OpenAI's tool_choice that narrows the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


THOUGHT = "<think>\nWhich city?\n</think>\n\n"
TEMPLATE = "{% if tools %}tools {% endif %}{{ messages[0].content }}"
STOP = FinishReason("stop", matched=3)


class Server:
    """A server whose model says `texts` in pieces of `size` characters; sample i says texts[i]."""

    def __init__(
        self, *texts: str, size: int = 3, finish: FinishReason = STOP, **options: Any
    ) -> None:
        config = Config.from_flat(
            {"served_model_name": "tiny", "tool_call_parser": "hermes"} | options
        )
        self.manager = ScriptedManager(config, self.answer)
        self.manager.templates = TemplateManager({"default": TEMPLATE})
        self.texts, self.size, self.finish = list(texts), size, finish
        self.http = TestClient(build_app(self.manager, config, self.manager.info))
        self.sdk = openai.OpenAI(
            base_url="http://testserver/v1", api_key="x", http_client=self.http, max_retries=0
        )
        self.chat = self.sdk.chat.completions

    def answer(self, request: GenerateRequest) -> list[Delta]:
        tokenizer = self.manager.tokenizer
        text = self.texts[(len(self.manager.seen) - 1) % len(self.texts)]
        pieces = [text[at : at + self.size] for at in range(0, len(text), self.size)]
        deltas, done = [], 0
        for piece in pieces:
            ids = tokenizer.encode(piece, False)
            done += len(ids)
            counts = {"prompt_tokens": 5, "completion_tokens": done}
            found = self.manager._logprobs(request, ids)
            deltas.append(Delta(request.rid, ids=ids, text=piece, logprobs=found, **counts))
        counts = {"prompt_tokens": 5, "completion_tokens": done + 1}
        return [*deltas, Delta(request.rid, ids=[3], finish=self.finish, **counts)]

    def create(self, **body: Any) -> Any:
        return self.chat.create(**{"model": "tiny", "messages": HI, "tools": TOOLS} | body)

    def post(self, **body: Any) -> Any:
        return self.http.post("/v1/chat/completions", json={"messages": HI, "tools": TOOLS} | body)

    def prompt(self) -> str:
        ids = unpack_ids(self.manager.seen[-1].ids).tolist()
        return self.manager.tokenizer.decode(ids, skip_special_tokens=False)


@functools.cache
def shared(text: str, **options: Any) -> Server:
    """A server for tests that do not look at what it has seen."""
    return Server(text, **options)


def test_whole_answer_with_calls():
    server = Server(f"Let me look.\n{CALL}\n{NOW}")
    choice = server.create().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "get_weather")
    assert json.loads(first.function.arguments) == {"city": "Paris", "days": 3}
    assert (second.function.name, second.function.arguments) == ("now", "{}")
    assert first.id.startswith("call_") and first.id != second.id


def test_content_is_null_beside_calls_alone():
    message = Server(CALL).post().json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] is None
    assert message["tool_calls"][0]["index"] == 0


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_stream_is_what_the_whole_answer_is(size):
    server = Server(f"Let me look.\n{CALL}\n{NOW}", size=size)
    chunks = list(server.create(stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == "tool_calls"
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me look."
    parts = [call for choice in choices for call in choice.delta.tool_calls or []]
    for index, (name, arguments) in enumerate(
        [("get_weather", '{"city": "Paris", "days": 3}'), ("now", "{}")]
    ):
        head, *rest = [part for part in parts if part.index == index]
        assert (head.type, head.function.name, head.function.arguments) == ("function", name, "")
        assert head.id.startswith("call_")
        assert all(part.id is part.type is part.function.name is None for part in rest)
        assert "".join(part.function.arguments for part in rest) == arguments
    assert chunks[-1].usage.completion_tokens == server.create().usage.completion_tokens


def test_every_delta_sends_what_it_adds():
    """Below the transport, where nothing joins deltas: one chunk for each piece of arguments."""
    server = Server(CALL, size=5)
    context = Context.create(server.manager, server.manager.config, server.manager.info, started=0)
    body = json.dumps({"messages": HI, "tools": TOOLS, "stream": True}).encode()
    job = openai_chat.parse(body, context, Stamp("chatcmpl-1", 0))
    sent = [job.reply.event(0, delta) for delta in server.answer(job.requests[0])]
    arguments = [
        json.loads(event)["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
        for data in sent
        for event in data.decode().replace("data: ", "").split("\n\n")
        if "tool_calls" in event and '"finish_reason":null' in event
    ]
    assert "".join(arguments) == '{"city": "Paris", "days": 3}'
    assert len(arguments) > 5


def test_stream_helper():
    with Server(f"Yes.\n{CALL}").chat.stream(model="tiny", messages=HI, tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert "content.delta" in kinds and "tool_calls.function.arguments.delta" in kinds
    done = next(event for event in events if event.type == "tool_calls.function.arguments.done")
    assert (done.name, json.loads(done.arguments)) == ("get_weather", {"city": "Paris", "days": 3})
    message = final.choices[0].message
    assert message.content == "Yes."
    assert message.tool_calls[0].function.arguments == '{"city": "Paris", "days": 3}'


def test_parse_helper():
    class get_weather(BaseModel):
        city: str
        days: int

    tool = openai.pydantic_function_tool(get_weather)
    answer = Server(CALL).chat.parse(model="tiny", messages=HI, tools=[tool])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == get_weather(
        city="Paris", days=3
    )


def test_strict_tools_that_cannot_be_enforced_are_told():
    tool = {"type": "function", "function": {"name": "now", "strict": True}}
    server = Server(NOW, tool_call_parser="none")
    answer = server.post(tools=[tool], parallel_tool_calls=False)
    assert answer.headers["x-headrace-ignored"] == "tools.strict,parallel_tool_calls"


def test_tool_loop():
    """Call, result, answer; the prompt of the second turn has both."""
    server = Server(CALL, "It rains.")
    server.manager.templates = TemplateManager({"default": LOOP})
    message = server.create().choices[0].message
    talk = [
        *HI,
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
    ]
    answer = server.create(messages=talk).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("It rains.", "stop")
    assert '[get_weather {"city": "Paris", "days": 3}]\n(rain)' in server.prompt()


LOOP = """
{%- for message in messages %}
{%- if message.role == 'tool' %}({{ message.content }})
{% elif message.tool_calls %}{% for call in message.tool_calls -%}
[{{ call.function.name }} {{ call.function.arguments | tojson }}]
{% endfor %}{% else %}{{ message.content }}
{% endif %}{% endfor %}"""


def test_samples_have_their_own_parsers():
    server = Server(CALL, "No.", f"Now.\n{NOW}")
    whole = server.create(n=3).choices
    assert [choice.finish_reason for choice in whole] == ["tool_calls", "stop", "tool_calls"]
    assert [choice.message.content for choice in whole] == [None, "No.", "Now."]
    texts, names = ["", "", ""], ["", "", ""]
    for chunk in Server(CALL, "No.", f"Now.\n{NOW}").create(n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            names[choice.index] += call.function.name or ""
    assert (texts, names) == (["", "No.", "Now."], ["get_weather", "", "now"])


def test_logprobs_cover_every_token():
    server = Server(f"Yes.\n{CALL}")
    whole = server.create(logprobs=True).choices[0].logprobs.content
    chunks = Server(f"Yes.\n{CALL}").create(logprobs=True, stream=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [item.token for part in parts for item in part] == [item.token for item in whole]
    assert b"".join(bytes(item.bytes) for item in whole).decode() == f"Yes.\n{CALL}"


def test_cut_off_call():
    server = Server(CALL[:60], finish=FinishReason("length", length=9))
    choice = server.create().choices[0]
    assert choice.finish_reason == "length"
    assert '{"city": "Paris", "days": 3}'.startswith(
        choice.message.tool_calls[0].function.arguments
    )


def test_what_is_no_call_is_content():
    choice = Server("<tool_call>oops</tool_call>").create().choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (
        "<tool_call>oops</tool_call>",
        None,
    )
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("body", [{"tools": None}, {"tool_choice": "none"}])
def test_without_usable_tools_markup_is_content(body):
    assert Server(NOW).post(**body).json()["choices"][0]["message"]["content"] == NOW


def test_parser_none():
    assert Server(NOW, tool_call_parser="none").create().choices[0].message.content == NOW


# -- reasoning --------------------------------------------------------------------------------


def test_reasoning_has_both_names():
    server = Server(f"{THOUGHT}Paris?", reasoning_parser="qwen3")
    answer = server.create()
    message = answer.choices[0].message
    assert message.content == "Paris?"
    assert message.reasoning == message.reasoning_content == "Which city?"
    tokens = len(server.manager.tokenizer.encode("Which city?", False))
    assert answer.usage.completion_tokens_details.reasoning_tokens == tokens
    parts = [chunk.choices[0].delta for chunk in server.create(stream=True)]
    thoughts = [part.reasoning_content for part in parts[:-1] if part.reasoning_content]
    assert "".join(thoughts) == "Which city?"
    assert thoughts == [part.reasoning for part in parts if getattr(part, "reasoning", None)]
    assert "".join(part.content or "" for part in parts) == "Paris?"


def test_reasoning_then_call():
    message = Server(THOUGHT + CALL, reasoning_parser="qwen3").create().choices[0].message
    assert (message.reasoning_content, message.content) == ("Which city?", None)
    assert message.tool_calls[0].function.name == "get_weather"


def test_reasoning_in_one_piece():
    server = Server(f"{THOUGHT}Paris?", reasoning_parser="qwen3")
    parts = server.create(stream=True, extra_body={"stream_reasoning": False})
    assert [thought for thought in thoughts_of(parts) if thought] == ["Which city?"]
    cut = Server("<think>Hm", reasoning_parser="qwen3", finish=FinishReason("length", length=2))
    parts = cut.create(stream=True, extra_body={"stream_reasoning": False})
    assert "Hm" in thoughts_of(parts)


def thoughts_of(chunks: Any) -> list[str | None]:
    return [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks]


def test_reasoning_left_in_the_text():
    server = Server(f"{THOUGHT}Paris?", reasoning_parser="qwen3")
    message = server.create(extra_body={"separate_reasoning": False}).choices[0].message
    assert message.content == f"{THOUGHT}Paris?"


@pytest.mark.parametrize(
    "extra",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}],
    ids=["kwargs", "effort"],
)
def test_reasoning_switched_off(extra):
    server = Server("a</think>b", reasoning_parser="deepseek-r1")
    assert server.create().choices[0].message.reasoning_content == "a"
    assert server.create(extra_body=extra).choices[0].message.content == "a</think>b"


def test_prompt_says_whether_reasoning_is_open():
    server = Server("a</think>b", reasoning_parser="qwen3")
    assert server.create().choices[0].message.content == "a</think>b"
    server.manager.templates = TemplateManager({"default": "{{ messages[0].content }}<think>\n"})
    message = server.create().choices[0].message
    assert (message.reasoning_content, message.content) == ("a", "b")


def test_dialects_are_detected_from_the_template():
    server = Server(f"{THOUGHT}{NOW}", tool_call_parser="auto")
    assert server.create().choices[0].message.content == f"{THOUGHT}{NOW}"
    source = "{{ tools[0].type }}{# <think> </think> <tool_call> #}"
    server.manager.templates = TemplateManager({"default": source})
    message = server.create().choices[0].message
    assert (message.reasoning_content, len(message.tool_calls)) == ("Which city?", 1)


def test_marks_that_are_special_tokens_are_made_visible():
    server = Server(NOW)
    server.create()
    assert server.manager.seen[-1].sampling.skip_special_tokens
    server = Server(NOW, reasoning_parser="granite", tool_call_parser="kimi_k2")
    tokenizer = server.manager.tokenizer
    tokenizer.backend.add_special_tokens(["<|tool_call_begin|>"])
    tokenizer.special_ids |= {tokenizer.backend.token_to_id("<|tool_call_begin|>")}
    server.create()
    assert not server.manager.seen[-1].sampling.skip_special_tokens
    server.create(tools=openai.NOT_GIVEN)
    assert server.manager.seen[-1].sampling.skip_special_tokens


def test_ids_are_those_of_the_model_or_fit_its_template():
    text = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )
    calls = Server(text, tool_call_parser="kimi_k2").create().choices[0].message.tool_calls
    assert [call.id for call in calls] == ["functions.now:0"]
    calls = Server("[TOOL_CALLS]now{}", tool_call_parser="mistral").create().choices[0].message
    assert len(calls.tool_calls[0].id) == 9 and calls.tool_calls[0].id.isalnum()


# -- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [*TOOLS, {"function": {"name": "a b"}}]}, "tools[2].function.name"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"parameters": {}}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"function": {"name": "a", "strict": "yes"}}]}, "tools[0].function.strict"),
        (
            {"tools": [{"function": {"name": "a", "description": 1}}]},
            "tools[0].function.description",
        ),
        ({"tools": TOOLS * 600}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "now"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": allowed("now", mode="never")}, "tool_choice"),
        ({"tool_choice": allowed()}, "tool_choice"),
        ({"tool_choice": allowed("nope")}, "tool_choice"),
        ({"parallel_tool_calls": "maybe"}, "parallel_tool_calls"),
        ({"separate_reasoning": 5}, "separate_reasoning"),
    ],
)
def test_wrong_bodies_name_the_field(body, field):
    answer = shared(NOW).post(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_are_enforced_or_refused(choice):
    server = Server(NOW)
    answer = server.post(tool_choice=choice)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] == "tool_choice"
        assert not server.manager.seen
    else:
        assert '"now' in server.manager.seen[-1].sampling.structural_tag.replace("\\", "")
        finish = answer.json()["choices"][0]["finish_reason"]
        assert finish == ("stop" if choice is NAMED else "tool_calls")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_the_only_ones(mode):
    server = Server(NOW)
    server.manager.templates = TemplateManager({"default": "{{ tools | tojson }}"})
    answer = server.post(tool_choice=allowed("now", mode=mode))
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    seen = server.manager.seen[-1]
    prompt = server.manager.tokenizer.decode(unpack_ids(seen.ids).tolist())
    assert [tool["function"]["name"] for tool in json.loads(prompt)] == ["now"]
    assert (seen.sampling.structural_tag is not None) == (mode == "required")


@pytest.mark.parametrize("dialect", ["hermes", "qwen3_coder", "gemma4", "none"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": []},
        {"properties": {"a": True, "b": 5, "c": None}, "required": 5},
        {"properties": {"a": {"enum": [10**30, None]}}, "$defs": 5},
        {"properties": {"a": {"type": ["string", 5], "pattern": 5}}, "required": [{}]},
        {"additionalProperties": {"$ref": "#/a/b"}, "properties": {"a": {"$ref": "#"}}},
        {"properties": {"a": {"type": {}, "anyOf": 5, "enum": {}}}},
    ],
)
def test_odd_schemas_are_no_server_error(dialect, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    server = shared(text, tool_call_parser=dialect)
    assert server.post(tools=[tool]).status_code == 200
    forced = server.post(tools=[tool], tool_choice="required")
    assert forced.status_code in (200, 400)


def test_deep_tools_are_refused():
    parameters: dict[str, Any] = {}
    for _ in range(35):
        parameters = {"properties": {"a": parameters}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = Server(NOW).post(tools=[tool], messages=None, input_ids=[5])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


# -- parsing text alone -----------------------------------------------------------------------


def test_parse_function_call_route():
    http = Server("").http
    body = {"text": f"Yes.\n{CALL}", "tools": TOOLS, "tool_call_parser": "qwen25"}
    assert http.post("/parse_function_call", json=body).json() == {
        "normal_text": "Yes.",
        "calls": [
            {
                "tool_index": 0,
                "name": "get_weather",
                "parameters": '{"city": "Paris", "days": 3}',
            }
        ],
    }
    answer = http.post("/parse_function_call", json=body | {"tool_call_parser": "klingon"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_call_parser")


def test_separate_reasoning_route():
    http = Server("").http
    body = {"text": f"{THOUGHT}Paris", "reasoning_parser": "qwen3"}
    assert http.post("/separate_reasoning", json=body).json() == {
        "reasoning_text": "Which city?",
        "text": "Paris",
    }
    answer = http.post("/separate_reasoning", json=body | {"reasoning_parser": "klingon"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reasoning_parser")
