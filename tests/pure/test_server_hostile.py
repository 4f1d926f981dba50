"""Bodies nobody should send: every answer is below 500 and has the one shape of errors."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.server.app import build_app
from headrace.server.schemas import REFUSED, ChatRequest, CompletionRequest
from headrace.text import template
from headrace.text.chat import TemplateManager
from tests.support.scripted_manager import ScriptedManager

INTEGERS = (0, -1, 1, 2, 129, 455, 2**31, -(2**31) - 1, 2**63, 2**64, -(2**63) - 1, 10**400)
NUMBERS = st.sampled_from((*INTEGERS, 0.5, -0.0, 1e-320, 1e308, True, False))
TEXTS = st.sampled_from(
    ["", "a", "\0", "ß🙂", "{{ 7 * 7 }}", "(a+)+$", "[", "9" * 5000, "x" * 3000]
)
SCALARS = st.none() | NUMBERS | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXTS | st.sampled_from(["type", "role", "content", "text"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
PART = st.fixed_dictionaries({}, optional={"type": SCALARS | st.just("text"), "text": JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", ""]) | JSON},
    optional={"content": st.lists(PART, max_size=2) | JSON, "tool_calls": JSON, "name": JSON},
)
SAMPLING = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_regex",
    "seed",
    "logit_bias",
]
NATIVE = [
    "text",
    "input_ids",
    "rid",
    "stream",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "priority",
    "extra_key",
    "return_text_in_logprobs",
    "return_prompt_token_ids",
]


def body(base: dict[str, Any], fields: list[str], **special) -> st.SearchStrategy[dict[str, Any]]:
    """`base` with a few of `fields` replaced by anything."""
    change = st.sampled_from(fields).flatmap(
        lambda name: st.tuples(st.just(name), special.get(name, JSON) | JSON)
    )
    return st.lists(change, min_size=1, max_size=4).map(lambda pairs: base | dict(pairs))


ROUTES = {
    "/v1/completions": body({"prompt": "a"}, [*CompletionRequest.model_fields, *REFUSED]),
    "/v1/chat/completions": body(
        {"messages": [{"role": "user", "content": "a"}]},
        [*ChatRequest.model_fields, *REFUSED],
        messages=st.lists(MESSAGE, max_size=3),
    ),
    "/generate": body(
        {"text": "a"},
        [*NATIVE, "sampling_params"],
        sampling_params=st.dictionaries(
            st.sampled_from([*SAMPLING, "max_new_tokens", "min_new_tokens", "ignore_eos", "regex"]),
            JSON,
            max_size=3,
        ),
    ),
    "/tokenize": body(
        {},
        ["prompt", "messages", "tools", "chat_template_kwargs", "add_special_tokens"],
        messages=st.lists(MESSAGE, max_size=3),
    ),
    "/detokenize": body({}, ["tokens", "skip_special_tokens"]),
    "/abort_request": body({}, ["rid", "abort_all"]),
}


@pytest.fixture(scope="module")
def client():
    config = Config.from_flat({"served_model_name": "tiny"})
    manager = ScriptedManager(config)
    with TestClient(build_app(manager, config, manager.info), raise_server_exceptions=False) as app:
        yield app


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_a_server_error(client, path, data):
    sent = json.dumps(data.draw(ROUTES[path])).encode()
    answer = client.post(path, content=sent, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert 0 < len(error["message"]) < 12_000


@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_are_a_server_error(client, path, raw):
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code < 500, raw


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"5": NaN}}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": [' + b'"a",' * 5000 + b'"a"]}',
        b'{"prompt": "a", "stop": [' + b'"a",' * 50 + b'"a"]}',
        b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d":1' % i for i in range(2000)) + b"}}",
        b'{"prompt": "a", "n": 128, "best_of": 1000000000, "temperature": -1}',
    ],
)
def test_known_traps(client, raw):
    answer = client.post(
        "/v1/completions", content=raw, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text


async def test_a_template_without_end_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(template, "MAX_RENDER_SECONDS", 1.0)
    config = Config.from_flat({"served_model_name": "tiny", "model_path": "/m/tiny"})
    manager = ScriptedManager(config)
    endless = "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    manager.templates = TemplateManager({"default": endless})
    app = build_app(manager, config, manager.info)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        paths = ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses")
        slow = [
            asyncio.create_task(client.post(path, json=body | {"model": "tiny", "input": "hi"}))
            for path in paths
        ]
        answered = 0
        while not all(task.done() for task in slow):
            assert (await client.get("/ready")).status_code == 200
            answered += 1
            await asyncio.sleep(0.005)
        assert answered > 5  # were the loop held, each body would allow one
        for task in slow:
            assert (await task).status_code == 400
            assert "took more than 1 s" in (await task).text
