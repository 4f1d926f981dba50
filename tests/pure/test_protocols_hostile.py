"""Bodies nobody should send, to the routes of Anthropic, Ollama, OpenAI's responses and batches."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.server.anthropic_input import MessagesRequest
from headrace.server.app import build_app
from headrace.server.ollama_input import ChatBody, GenerateBody
from headrace.server.responses_input import ResponsesRequest
from tests.pure.test_server_hostile import JSON, MESSAGE, SCALARS, body
from tests.support.scripted_manager import ScriptedManager

HI = [{"role": "user", "content": "a"}]
BLOCK_NAMES = ["text", "thinking", "tool_use", "tool_result", "document", "search_result", "image"]
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(BLOCK_NAMES) | SCALARS},
    optional={name: JSON for name in ("text", "thinking", "id", "name", "input", "source")}
    | {"content": JSON, "tool_use_id": JSON, "is_error": JSON, "title": JSON},
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | JSON},
    optional={"content": st.lists(BLOCK, max_size=3) | JSON},
)
ITEM_NAMES = ["message", "function_call", "function_call_output", "reasoning", "custom_tool_call"]
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from([*ITEM_NAMES, "item_reference"]) | SCALARS,
        "role": st.sampled_from(["user", "assistant", "developer"]) | JSON,
        "content": st.lists(
            st.fixed_dictionaries({"type": st.sampled_from(["input_text", "refusal"]) | JSON}),
            max_size=2,
        )
        | JSON,
    }
    | {name: JSON for name in ("call_id", "name", "arguments", "output", "input", "summary")},
)
TOOL = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["function", "custom", "web_search"]) | SCALARS,
        "name": st.just("f") | JSON,
        "input_schema": JSON,
        "parameters": JSON,
        "description": JSON,
        "format": JSON,
        "function": st.fixed_dictionaries({"name": st.just("f") | JSON}) | JSON,
    },
)
TOOLS = st.lists(TOOL, max_size=2)
OPTIONS = st.dictionaries(
    st.sampled_from(["temperature", "top_k", "stop", "seed", "num_predict", "num_ctx"]), JSON
)
ROUTES = {
    "/v1/messages": body(
        {"messages": HI, "max_tokens": 4},
        [*MessagesRequest.model_fields, "extra"],
        messages=st.lists(TURN, max_size=3),
        tools=TOOLS,
    ),
    "/v1/messages/count_tokens": body(
        {"messages": HI}, ["messages", "system", "tools"], messages=st.lists(TURN, max_size=3)
    ),
    "/v1/responses": body(
        {"input": "a"},
        [*ResponsesRequest.model_fields, "extra"],
        input=st.lists(ITEM, max_size=3),
        tools=TOOLS,
    ),
    "/api/chat": body(
        {"model": "tiny", "messages": HI},
        [*ChatBody.model_fields, "extra"],
        messages=st.lists(MESSAGE, max_size=3),
        tools=TOOLS,
        options=OPTIONS,
    ),
    "/api/generate": body(
        {"model": "tiny", "prompt": "a"},
        [*GenerateBody.model_fields, "extra"],
        options=OPTIONS,
    ),
    "/api/show": body({}, ["model", "name", "verbose"]),
    "/v1/batches": body(
        {"input_file_id": "f", "endpoint": "/v1/responses", "completion_window": "24h"},
        ["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"],
    ),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    store = tmp_path_factory.mktemp("batches") / "b.db"
    config = Config.from_flat({"served_model_name": "tiny", "batch_store": str(store)})
    manager = ScriptedManager(config)
    with TestClient(build_app(manager, config, manager.info), raise_server_exceptions=False) as app:
        yield app


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_a_server_error(client, path, data):
    sent = json.dumps(data.draw(ROUTES[path])).encode()
    answer = client.post(path, content=sent, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]


@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_are_a_server_error(client, path, raw):
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code < 500, raw


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"\xff" * 100),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: y\r\n\r\nz\r\n--x--\r\n"),
    ],
)
def test_wrong_uploads(client, kind, raw):
    answer = client.post("/v1/files", content=raw, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text


BIG = 10**30


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/messages", {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "b", "input": {"c": BIG}}]}]}),
        ("/v1/messages", {"output_format": {"type": "json_schema", "schema": {"minimum": BIG}}}),
        ("/v1/responses", {"tools": [{"type": "function", "name": "f", "parameters": {"a": BIG}}]}),
        ("/v1/responses", {"tools": [{"type": "web_search", "a": BIG}]}),
        ("/v1/responses", {"tool_choice": {"type": "allowed_tools", "tools": 5}}),
        ("/v1/responses", {"tool_choice": {"type": "allowed_tools", "tools": [5]}}),
        ("/v1/responses", {"tool_choice": {"type": "function", "name": [{}]}}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"a": BIG}}}}),
        ("/v1/responses", {"text": {"format": {"type": "text", "a": BIG}}}),
        ("/api/chat", {"options": {"stop": 5}}),
        ("/api/chat", {"options": {"num_predict": "many"}}),
        ("/api/chat", {"options": {"seed": BIG}}),
        ("/api/chat", {"format": {"minimum": BIG}}),
        ("/api/chat", {"messages": [{"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "a", "arguments": {"b": BIG}}}]}]}),
    ],
)  # fmt: skip
def test_known_traps(client, path, fields):
    base = {"model": "tiny", "max_tokens": 4, "messages": HI, "input": "a"}
    answer = client.post(path, json=base | fields)
    assert answer.status_code == 400, answer.text


def test_halves_of_characters_are_refused(client):
    raw = b'{"model": "tiny", "input": "\\ud800", "max_tokens": 4, "messages": []}'
    for path in ("/v1/responses", "/v1/messages", "/api/chat"):
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
